"""Guidance from inside: a second head after an earlier block, v = v_mid + g·(v_end − v_mid)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.latents import make_latents, make_model, make_task
from helpers.random_model import COMPOSITE, random_model
from sfd.data.shapes import ShapesSource
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.models.inference import cannot_compile
from sfd.models.warm_start import warm_start
from sfd.run.recipe import load_recipe
from sfd.sampling import initial_noise
from sfd.utils.errors import SFDError
from test_generate import Calls, latents

SCALES, TIMES = [1.3, 1.9], torch.tensor([0.3, 0.6])
HEAD = {"depth": 3, "guide_block": 2}


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(0, network=HEAD)


def inside(model: Model, guidance, **settings):
    return latents(model, guidance=guidance, guidance_from="inside", **settings)


def test_it_is_its_formula_in_one_call_of_the_same_batch(model):
    x, labels = initial_noise([4, 5, 6], COMPOSITE), torch.tensor([0, 1, 2])
    config = SamplingConfig(guidance=dict(zip(COMPOSITE.names, SCALES, strict=True)), guidance_from="inside")
    with torch.no_grad():
        output = model.transformer(x, TIMES.expand(3, 2), labels, second_head=True)
    expected = output.guiding + COMPOSITE.per_entry(torch.tensor(SCALES)) * (output.velocity - output.guiding)
    sizes = []
    hook = model.transformer.register_forward_hook(lambda network, given, result: sizes.append(len(given[0])))
    torch.testing.assert_close(model.velocity_field(labels, config)(x, TIMES), expected)
    hook.remove()
    assert sizes == [3]


def test_scale_one_is_the_plain_network_without_the_second_head(model):
    with Calls(model) as calls:
        assert torch.equal(inside(model, 1.0), latents(model))
    assert calls.count == 6
    model.transformer.guide_norm.register_forward_hook(lambda *_: pytest.fail("the second head was evaluated"))
    latents(model)
    model.transformer.guide_norm._forward_hooks.clear()


def test_it_holds_inside_intervals_and_for_moving_streams_only(model):
    guided = inside(model, {"semantic": 2.0}, interval=(0.2, 0.8), steps=6)
    never = inside(model, {"semantic": 2.0}, interval=(0.5, 0.5), steps=6)
    assert (guided - latents(model, steps=6)).abs().max() > 0.01
    assert torch.equal(never, latents(model, steps=6))


@pytest.mark.skipif(cannot_compile(torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_compiled_and_bf16_give_the_same_pair(model):
    x, labels = initial_noise([4, 5, 6], COMPOSITE), torch.tensor([0, 1, 2])
    exact = model.inference().inside(labels)(x, TIMES)
    for ours, plain in zip(model.inference(compiled=True).inside(labels)(x, TIMES), exact, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    for rough, plain in zip(model.inference("bf16").inside(labels)(x, TIMES), exact, strict=True):
        assert 0 < (rough - plain).norm() / plain.norm() < 0.05


def test_it_is_trained_by_the_velocity_losses_at_its_weight(tmp_path):
    data = make_latents(ShapesSource(24, 0, 16), tmp_path)
    task = make_task(data, model=make_model(data, guide_block=1), guide=0.25, stationary_streams=False)
    plain = make_task(data, model=task.model, stationary_streams=False)
    batch = task.batch(0, range(8))
    with_head, without = task.loss(task.model, batch), plain.loss(task.model, batch)
    torch.testing.assert_close(with_head["loss"], without["loss"] + 0.25 * with_head["guide"])
    with_head["loss"].backward()
    assert all(p.grad is not None for p in task.model.parameters())


def test_a_model_without_one_gets_it_by_a_warm_start(model):
    plain = random_model(1, network={"depth": 3})
    fresh = warm_start(model.transformer, plain.transformer, model.classes, plain.classes)
    assert {name.partition(".")[0] for name in fresh} == {"guide_norm", "guide_modulation", "guide_heads"}
    torch.testing.assert_close(latents(model), latents(plain))


@pytest.mark.parametrize(
    "overrides",
    [
        ["transformer.guide_block=2"],
        ["loss.guide=0.25"],
        ["sample.guidance_from=inside"],
        ["sample.guidance_from=guiding_model"],
        ["evaluation.guiding_model=elsewhere"],
    ],
)
def test_recipes_that_name_a_source_and_lack_it_are_refused(overrides):
    with pytest.raises(SFDError, match=r"guidance_from|guide_block"):
        load_recipe(Path("shapes-demo"), overrides)


def test_sampling_without_the_source_is_refused(model):
    plain = random_model(0)
    with pytest.raises(SFDError, match="second head"):
        inside(plain, 2.0)
    with pytest.raises(SFDError, match="no guiding model was given"):
        latents(plain, guidance=2.0, guidance_from="guiding_model")
    with pytest.raises(SFDError, match="a guiding model was given"):
        latents(plain, model, guidance=2.0, guidance_from="null_class")
