"""Published texture autoencoders: latents equal those of diffusers' own model."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfd.encoders import kl, load_encoder, open_texture, planned_encoder
from sfd.utils.errors import SFDError
from small_published import KL, change_config, offline, save_kl  # noqa: F401

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl") / "vae"
    return save_kl(folder), folder


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the folder, to damage."""
    return shutil.copytree(model[1], tmp_path / "vae")


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_are_the_unscaled_posterior_mean(model):
    encoder = open_texture(model[1])
    moments = model[0].quant_conv(model[0].encoder(images()))
    torch.testing.assert_close(encoder.encode(images()), moments.chunk(2, dim=1)[0])
    assert (encoder.channels, encoder.downsample) == (3, 2)
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model[0].decoder(model[0].post_quant_conv(latents))
    torch.testing.assert_close(encoder.decode(latents), expected)


def test_it_is_saved_as_a_component_that_needs_no_hub(model, tmp_path):
    encoder = open_texture(model[1])
    encoder.save(tmp_path / "part")
    loaded = load_encoder(tmp_path / "part")
    assert loaded.identity == encoder.identity and not loaded.training
    assert torch.equal(loaded.encode(images()), encoder.encode(images()))
    assert open_texture(tmp_path / "part").identity == encoder.identity


@pytest.mark.parametrize("name", ["stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"])
def test_published_names_are_planned_offline(name):
    config = planned_encoder("kl", name, None, {})
    assert (config.kind, config.channels, config.downsample) == ("texture encoder", 4, 8)
    with torch.device("meta"):
        assert sum(p.numel() for p in kl.build(config).parameters()) == 83_653_863  # the published size


def test_the_config_must_match_the_folder(model):
    assert kl.pretrained(str(model[1]), {"block_out_channels": list(KL["block_out_channels"])}).channels == 3
    with pytest.raises(SFDError, match=r"latent_channels = 4, but .* has 3"):
        kl.planned(str(model[1]), {"latent_channels": 4})


def test_a_name_in_the_local_cache_is_found_without_the_hub(model, tmp_path):
    repository = tmp_path / "cache" / "models--someone--some-vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model[1], repository / "snapshots" / ("0" * 40))
    assert planned_encoder("kl", "someone/some-vae", None, {}).downsample == 2
    assert open_texture("someone/some-vae").identity == open_texture(model[1]).identity


class TestBadSources:
    def refused(self, source, message):
        with pytest.raises(SFDError, match=message):
            open_texture(source)

    @pytest.mark.parametrize("name", ["someone/some-vae", "stabilityai/sd-vae-ft-mse"])
    def test_offline(self, name):
        self.refused(name, f"`hf download {name}`")

    def test_a_missing_config(self, copy):
        (copy / "config.json").unlink()
        self.refused(copy, "config.json is missing")

    def test_pickled_weights(self, copy):
        (copy / WEIGHTS).rename(copy / "diffusion_pytorch_model.bin")
        self.refused(copy, "pickled ones")

    def test_truncated_weights(self, copy):
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-9])
        self.refused(copy, "cannot be loaded")

    def test_missing_and_extra_tensors(self, copy):
        tensors = load_file(copy / WEIGHTS)
        tensors["decoder.conv_in.scale"] = tensors.pop("quant_conv.bias")
        save_file(tensors, copy / WEIGHTS)
        self.refused(copy, r"decoder\.conv_in\.scale, quant_conv\.bias")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"_class_name": "VQModel"}, "no AutoencoderKL"),
            ({"in_channels": 1}, "RGB"),
            ({"latent_channels": 5}, "conv_out"),
        ],
    )
    def test_a_wrong_config(self, copy, changes, message):
        change_config(copy, **changes)
        self.refused(copy, message)
