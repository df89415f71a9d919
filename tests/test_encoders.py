import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.pictures import Unlabelled
from sfd.data.images import to_tensor
from sfd.data.shapes import ShapesSource
from sfd.encoders import autoencoder_kl, convnet, load_encoder, open_semantic, open_texture
from sfd.training.config import TrainSettings
from sfd.training.tasks import TASKS
from sfd.training.tasks.semantic import vicreg
from sfd.training.trainer import fit
from sfd.utils import files, registry, rng
from sfd.utils.errors import SFDError

SMALL = {
    "autoencoder_kl": autoencoder_kl.Config(widths=(8, 16), latent_channels=4),
    "convnet": convnet.Config(widths=(8, 8, 16), channels=12),
}
CHANNELS = {"autoencoder_kl": 4, "convnet": 12}


@pytest.fixture(scope="module")
def source():
    return ShapesSource(256, seed=0)


@pytest.fixture(scope="module")
def images(source):
    return to_tensor(source.load(range(6)))


def make(name: str, seed: int = 0):
    with rng.seeded(seed, "test"):
        return registry.find("sfd.encoders", name, "encoder").build(SMALL[name]).eval()


def make_task(name: str, source, seed: int = 0, batch_size: int = 16):
    task = TASKS[name]
    return task(make(name), source, task.Objective(), seed=seed, batch_size=batch_size)


@pytest.mark.parametrize("name", SMALL)
class TestEveryEncoder:
    def test_gives_the_declared_channels_and_grid(self, name, images):
        encoder = make(name)
        side = 32 // encoder.downsample
        assert encoder.encode(images).shape == (6, CHANNELS[name], side, side)
        assert encoder.encode(torch.zeros(1, 3, 64, 48)).shape[2:] == (8, 6)
        assert encoder.channels == CHANNELS[name] and not encoder.encode(images).requires_grad
        assert name == "convnet" or encoder.decode(encoder.encode(images)).shape == images.shape

    def test_encodes_each_image_by_itself(self, name, images):
        encoder = make(name)
        alone = torch.cat([encoder.encode(image[None]) for image in images])
        torch.testing.assert_close(encoder.encode(images), alone, rtol=1e-4, atol=1e-5)

    def test_refuses_sizes_that_do_not_divide(self, name):
        with pytest.raises(SFDError, match=r"30×32.*multiple of 8"):
            make(name).encode(torch.zeros(1, 3, 30, 32))

    def test_saves_and_loads(self, name, images, tmp_path):
        encoder = make(name)
        encoder.save(tmp_path)
        loaded = load_encoder(tmp_path)
        assert torch.equal(loaded.encode(images), encoder.encode(images))
        assert loaded.identity == encoder.identity and not loaded.training
        encoder.save(tmp_path / "half", torch.float16)
        assert load_file(tmp_path / "half" / "model.safetensors").popitem()[1].dtype == torch.float16
        assert load_encoder(tmp_path / "half").identity == encoder.identity

    def test_identity_differs_with_the_weights(self, name):
        assert make(name).identity == make(name).identity != make(name, seed=1).identity

    def test_training_lowers_the_loss(self, name, source, tmp_path):
        task = make_task(name, source)
        settings = TrainSettings(steps=120, batch_size=16, learning_rate=5e-3, log_every=1)
        encoder = task.finish(fit(task, settings, tmp_path, device=torch.device("cpu")))
        losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert np.mean(losses[-10:]) < 0.93 * np.mean(losses[:10])
        assert encoder.kind == make(name).kind


def test_texture_autoencoder_starts_as_principal_components(source):
    """Untrained, it reconstructs as well as the best linear map of 8×8 patches."""
    images = to_tensor(source.load(range(256)))
    encoder = make("autoencoder_kl")
    encoder.start_from(images)
    patches = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2).flatten(0, 1).double()
    discarded = torch.linalg.eigvalsh(torch.cov(patches.T))[:-4].sum() / 192
    error = (encoder.decode(encoder.encode(images)) - images).square().mean()
    assert float(error) == pytest.approx(float(discarded), rel=0.03)
    spread = encoder.encode(images).flatten(2).transpose(1, 2).flatten(0, 1).std(0)
    assert spread.tolist() == pytest.approx([1] * 4, rel=1e-3)


def test_semantic_training_works_without_labels():
    task = make_task("convnet", Unlabelled(256))
    losses = task.loss(task.model, task.batch(0, range(16)))
    assert "accuracy" not in losses
    losses["loss"].backward()
    assert all(p.grad is not None for p in task.model.parameters())


def test_vicreg_of_independent_unit_features_is_zero():
    """Orthogonal ±1 columns: unit variance, no covariance, equal views."""
    hadamard = torch.tensor([[1.0]])
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    features = hadamard[:, 1:5, None, None] * math.sqrt(15 / 16)  # (16, 4, 1, 1)
    invariance, variance, covariance = vicreg(features, features)
    assert [float(invariance), float(variance), float(covariance)] == pytest.approx([0, 0, 0], abs=1e-4)


def test_vicreg_takes_features_of_the_position_alone_for_constant():
    position = torch.arange(4.0).view(1, 1, 2, 2).expand(8, 3, 2, 2)
    _, variance, _ = vicreg(position, position)
    assert float(variance) == pytest.approx(1 - 0.01, abs=1e-3)


class TestBadFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        make("convnet").save(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(("name", "message"), [(".", "config.json is missing"), ("none", "there is no folder")])
    def test_without_a_component(self, tmp_path, name, message):
        with pytest.raises(SFDError, match=message):
            load_encoder(tmp_path / name)

    def test_of_the_other_encoder_kind(self, folder):
        assert open_semantic(folder).channels == 12
        with pytest.raises(SFDError, match=r"holds a semantic encoder .* a texture encoder was expected"):
            open_texture(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda about: about.pop("identity"), "lacks identity"),
            (lambda about: about["config"].update(chanels=3), "did you mean 'channels'"),
            (lambda about: about["config"].update(channels=13), "size mismatch for head.weight"),
            (lambda about: about.update(sha256="0" * 64), r"model\.safetensors is damaged"),
        ],
    )
    def test_with_another_config(self, folder, change, message):
        about = files.read_json(folder / "config.json", "part")
        change(about)
        (folder / "config.json").write_text(json.dumps(about))
        with pytest.raises(SFDError, match=message):
            load_encoder(folder)

    def test_with_missing_and_extra_tensors(self, folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["tail.bias"] = tensors.pop("head.bias")
        save_file(tensors, folder / "model.safetensors")
        about = files.read_json(folder / "config.json", "encoder")
        about["sha256"] = files.checksum(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(about))
        with pytest.raises(SFDError, match=r"Missing.*head\.bias.*Unexpected.*tail\.bias"):
            load_encoder(folder)
