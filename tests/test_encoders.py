import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfd.data.images import to_tensor
from sfd.data.shapes import ShapesSource
from sfd.encoders import autoencoder_kl, convnet, load_encoder, open_semantic, open_texture
from sfd.models.pca import PCA, PCAConfig
from sfd.training.config import TrainSettings
from sfd.training.tasks import TASKS
from sfd.training.tasks.augment import DRAWS, recolour
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
        assert encoder.channels == CHANNELS[name]

    def test_keeps_no_gradient(self, name, images):
        assert not make(name).encode(images).requires_grad

    def test_encodes_each_image_by_itself(self, name, images):
        encoder = make(name)
        alone = torch.cat([encoder.encode(image[None]) for image in images])
        torch.testing.assert_close(encoder.encode(images), alone, rtol=1e-4, atol=1e-5)

    def test_takes_other_image_sizes(self, name):
        assert make(name).encode(torch.zeros(1, 3, 64, 48)).shape[2:] == (8, 6)

    def test_refuses_sizes_that_do_not_divide(self, name):
        with pytest.raises(SFDError, match=r"30×32.*multiple of 8"):
            make(name).encode(torch.zeros(1, 3, 30, 32))

    def test_saves_and_loads(self, name, images, tmp_path):
        encoder = make(name)
        encoder.save(tmp_path)
        loaded = load_encoder(tmp_path)
        assert torch.equal(loaded.encode(images), encoder.encode(images))
        assert loaded.identity == encoder.identity
        assert not loaded.training

    def test_half_precision_files_keep_the_identity(self, name, tmp_path):
        encoder = make(name)
        encoder.save(tmp_path, torch.float16)
        assert load_file(tmp_path / "model.safetensors").popitem()[1].dtype == torch.float16
        assert load_encoder(tmp_path).identity == encoder.identity

    def test_identity_tells_weights_and_configurations_apart(self, name):
        identities = {make(name).identity, make(name, seed=1).identity, "x"}
        assert len(identities) == 3
        assert make(name).identity == make(name).identity

    def test_batches_do_not_depend_on_how_they_are_split(self, name, source):
        task = make_task(name, source)
        whole, parts = task.batch(5, range(16)), [task.batch(5, range(8)), task.batch(5, range(8, 16))]
        for key, value in whole.items():
            assert torch.equal(value, torch.cat([part[key] for part in parts]))

    def test_batches_differ_between_steps(self, name, source):
        task = make_task(name, source)
        for key, value in task.batch(0, range(16)).items():
            assert not torch.equal(value, task.batch(1, range(16))[key])

    def test_training_lowers_the_loss(self, name, source, tmp_path):
        task = make_task(name, source)
        settings = TrainSettings(steps=120, batch_size=16, learning_rate=5e-3, log_every=1)
        encoder = task.finish(fit(task, settings, tmp_path, device=torch.device("cpu")))
        losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert np.mean(losses[-10:]) < 0.93 * np.mean(losses[:10])
        assert encoder.kind == make(name).kind


def test_texture_decoding_has_the_images_shape(images):
    encoder = make("autoencoder_kl")
    assert encoder.decode(encoder.encode(images)).shape == images.shape


def test_texture_autoencoder_starts_as_principal_components(source):
    """Before any training it reconstructs as well as the best linear map of 8×8 patches, but for the bias."""
    images = to_tensor(source.load(range(256)))
    encoder = make("autoencoder_kl")
    encoder.start_from(images)
    patches = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2).flatten(0, 1).double()
    discarded = torch.linalg.eigvalsh(torch.cov(patches.T))[:-4].sum() / 192
    error = (encoder.decode(encoder.encode(images)) - images).square().mean()
    assert float(error) == pytest.approx(float(discarded), rel=0.03)
    assert encoder.encode(images).flatten(2).transpose(1, 2).flatten(0, 1).std(0).tolist() == pytest.approx(
        [1] * 4, rel=1e-3
    )


@pytest.mark.parametrize(("module", "channels"), [(autoencoder_kl, 16), (convnet, 64)])
def test_defaults_fit_the_budget_and_the_grid(module, channels):
    encoder = module.build(module.Config())
    assert sum(p.numel() for p in encoder.parameters()) <= 500_000
    assert encoder.encode(torch.zeros(1, 3, 32, 32)).shape == (1, channels, 4, 4)


def test_semantic_training_works_without_labels(source):
    unlabelled = type("Unlabelled", (), {})()
    unlabelled.load, unlabelled.image_size, unlabelled.classes = source.load, 32, ()
    unlabelled.labels = np.zeros(len(source), np.int64)
    type(unlabelled).__len__ = lambda _: len(source)
    task = make_task("convnet", unlabelled)
    losses = task.loss(task.model, task.batch(0, range(16)))
    assert "accuracy" not in losses
    losses["loss"].backward()
    assert all(p.grad is not None for p in task.model.parameters())


def test_recolouring_leaves_geometry(images):
    """A flat image stays flat but for the grain, whatever its colour becomes; an edge stays where it is."""
    half = torch.full((8, 3, 16, 16), -0.5)
    half[:, :, :, 8:] = 0.5
    draws = torch.rand(8, DRAWS, generator=torch.Generator().manual_seed(0))
    draws[:, 13] = 0  # no noise
    seen = recolour(half, draws)
    assert float(seen[..., :6].diff(dim=3).abs().max()) < 1e-5
    assert float(seen[..., 10:].diff(dim=3).abs().max()) < 1e-5
    assert float((seen[..., 2] - seen[..., 13]).abs().amax(dim=(1, 2)).min()) > 0.05


def test_recolouring_is_of_each_image_alone(images):
    draws = torch.rand(6, DRAWS, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([recolour(images[i : i + 1], draws[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(recolour(images, draws), alone)
    assert recolour(images, draws).abs().max() <= 1


def test_vicreg_of_independent_unit_features_is_zero():
    """Orthogonal ±1 columns: unit variance, no covariance, equal views."""
    hadamard = torch.tensor([[1.0]])
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    features = hadamard[:, 1:5, None, None] * math.sqrt(15 / 16)  # (16, 4, 1, 1)
    invariance, variance, covariance = vicreg(features, features)
    assert [float(invariance), float(variance), float(covariance)] == pytest.approx([0, 0, 0], abs=1e-4)


def test_vicreg_takes_features_of_the_position_for_constant():
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

    def test_of_another_kind(self, tmp_path):
        PCA(PCAConfig(input_channels=3, latent_channels=2)).save(tmp_path)
        with pytest.raises(SFDError, match="holds a compressor"):
            load_encoder(tmp_path)

    def test_of_the_other_encoder_kind(self, folder):
        assert open_semantic(folder).channels == 12
        with pytest.raises(SFDError, match=r"holds a semantic encoder .* a texture encoder was expected"):
            open_texture(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda about: about.pop("identity"), "lacks identity"),
            (lambda about: about.update(name="convnett"), "did you mean 'convnet'"),
            (lambda about: about["config"].update(chanels=3), "did you mean 'channels'"),
            (lambda about: about["config"].update(channels=13), r"misshapen: .*head.weight \(12, 16, 1, 1\) for \(13,"),
            (lambda about: about.update(sha256="0" * 64), r"model\.safetensors is damaged"),
            (lambda about: about.clear(), "lacks kind"),
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
        with pytest.raises(SFDError, match=r"missing: head\.bias; unexpected: tail\.bias"):
            load_encoder(folder)

    def test_with_truncated_weights(self, folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:100])
        with pytest.raises(SFDError, match="is no intact safetensors file"):
            load_encoder(folder)
