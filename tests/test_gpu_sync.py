"""Training and sampling do not synchronise with a GPU, and leave no tensor on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.latents import make_latents, make_model, make_task
from helpers.random_model import COMPOSITE, random_model
from helpers.sync_guard import FAR, far, forbid_syncs
from sfd.data.shapes import ShapesSource
from sfd.generation.config import SamplingConfig
from sfd.models.inference import Inference
from sfd.sampling import initial_noise, integrate
from sfd.training.config import TrainSettings
from sfd.training.trainer import Trainer

__all__ = ["far"]

TRAINING = TrainSettings(steps=100, batch_size=4, learning_rate=1e-3, ema=0.9, clip=1.0, accumulate=2)
SETTINGS = {
    "plain": SamplingConfig(steps=6),
    "guided": SamplingConfig(steps=9, guidance=1.5, interval=(0.1, 0.9)),
    "one stream": SamplingConfig(steps=6, guidance={"texture": 1.5}),
    "bf16": SamplingConfig(steps=6, guidance=1.5, precision="bf16"),
    "sde": SamplingConfig(steps=6, solver="sde", guidance=1.5),
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return make_latents(ShapesSource(24, 0, 16), tmp_path_factory.mktemp("latents"))


@pytest.mark.parametrize(
    ("checkpointing", "losses"), [(False, {}), (False, {"stationary_streams": False}), (True, {}), ("selective", {})]
)
def test_a_training_step_does_not_synchronise(latents, tmp_path, far, checkpointing, losses):
    model = make_model(latents)
    model.config = model.config.model_copy(update={"checkpointing": checkpointing})
    task = make_task(latents, model=model, batch_size=TRAINING.batch_size, **losses)
    training = Trainer(task, TRAINING, tmp_path, FAR)
    with training.running():
        training.train_step()  # copies the weights of the loss once
        with forbid_syncs():
            training.train_step()
    assert training.step == 2 and all(p.device == FAR for p in training.network.parameters())


def sampled(settings: SamplingConfig) -> Tensor:
    model = random_model(0).to(FAR)
    velocity = model.velocity_field(torch.tensor([0, 2]).to(FAR), settings)
    noise = initial_noise([3, 4], COMPOSITE).to(FAR)
    how = {"solver": settings.solver, "steps": settings.steps, "seeds": [3, 4]}
    with forbid_syncs():
        return integrate(velocity, noise, model.schedule, COMPOSITE, **how).x


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_sampling_does_not_synchronise(far, settings):
    assert sampled(settings).device == FAR


def test_decoding_copies_to_the_cpu_once(far, monkeypatch):
    model, copies = random_model(0).to(FAR), []
    packed = initial_noise(range(40), COMPOSITE).to(FAR)  # more than are decoded at once

    def cpu(images: Tensor) -> Tensor:
        copies.append(tuple(images.shape))
        return torch.zeros(images.shape, dtype=images.dtype)

    monkeypatch.setattr(Tensor, "cpu", cpu)
    with forbid_syncs():
        images = model.decode(packed)
    assert copies == [images.shape]


@pytest.mark.parametrize("kind", ["plain", "bf16", "compiled"])
def test_attention_inputs_suit_the_fused_kernels(kind, monkeypatch):
    """One dtype (bf16 for flash attention), no mask, contiguous channels."""
    seen, attend = [], F.scaled_dot_product_attention

    def recorded(*tensors: Tensor, **options: object) -> Tensor:
        assert not options
        seen.extend(tensors)
        return attend(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    network = Inference(random_model(0).transformer.to(FAR), "float32" if kind == "plain" else "bf16").network
    if kind == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        network(torch.zeros(2, COMPOSITE.size, device=FAR), torch.zeros(2, 2, device=FAR), torch.tensor([0, 1]).to(FAR))
    assert {t.dtype for t in seen} == {torch.float32 if kind == "plain" else torch.bfloat16}
    assert len(seen) == 3 and all(t.stride(-1) == 1 for t in seen)
