"""Published texture autoencoders: latents are those of diffusers' own model, whatever they are loaded from."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfd.encoders import kl, load_encoder, open_texture, planned_encoder
from sfd.run.recipe import load_recipe
from sfd.utils.errors import SFDError
from small_published import KL, change_config, offline, save_kl  # noqa: F401
from tiny import RECIPE, write_recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2731523448\n"


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


def test_latents_are_the_posteriors_mean_unscaled(model):
    encoder = open_texture(model[1])
    moments = model[0].quant_conv(model[0].encoder(images()))
    torch.testing.assert_close(encoder.encode(images()), moments.chunk(2, dim=1)[0])
    assert (encoder.channels, encoder.downsample) == (3, 2)


def test_decoding_is_the_models_own(model):
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model[0].decoder(model[0].post_quant_conv(latents))
    torch.testing.assert_close(open_texture(model[1]).decode(latents), expected)


def test_it_is_saved_as_a_component_that_needs_no_hub(model, tmp_path):
    encoder = open_texture(model[1])
    encoder.save(tmp_path / "part")
    loaded = load_encoder(tmp_path / "part")
    assert loaded.identity == encoder.identity and not loaded.training
    assert torch.equal(loaded.encode(images()), encoder.encode(images()))
    assert open_texture(tmp_path / "part").identity == encoder.identity


def test_identity_tells_weights_apart(model, copy):
    tensors = load_file(copy / WEIGHTS)
    tensors["quant_conv.bias"] += 1
    save_file(tensors, copy / WEIGHTS)
    assert open_texture(copy).identity != open_texture(model[1]).identity


def test_former_names_of_attention_are_known(model, copy):
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, tensor in load_file(copy / WEIGHTS).items():
        for present, before in former.items():
            name = name.replace(present, before)
        renamed[name] = tensor
    assert sum(".proj_attn." in name for name in renamed) == 2 * (2 + 1 + 2)  # both mids, a level down, two blocks up
    save_file(renamed, copy / WEIGHTS)
    assert open_texture(copy).identity == open_texture(model[1]).identity


@pytest.mark.parametrize("name", ["stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"])
def test_published_names_are_planned_offline(name):
    config = planned_encoder("kl", name, None, {})
    assert (config.kind, config.channels, config.downsample) == ("texture encoder", 4, 8)
    with torch.device("meta"):
        assert sum(p.numel() for p in kl.build(config).parameters()) == 83_653_863  # the published size


def test_a_folder_is_planned_from_its_config_alone(copy):
    (copy / WEIGHTS).unlink()
    config = planned_encoder("kl", str(copy), None, {})
    assert (config.channels, config.downsample) == (3, 2)


def test_config_stands_for_a_folder_that_is_not_there_yet():
    config = planned_encoder("kl", "weights/sdvae-f16d32", None, {"latent_channels": 32, "norm_num_groups": 16})
    assert config == kl.Config(norm_num_groups=16)


def test_config_must_agree_with_the_folder(model):
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

    def test_a_missing_folder_is_no_hub_name(self, tmp_path):
        with pytest.raises(SFDError, match="no folder") as error:
            open_texture(tmp_path / "none")
        assert "hf download" not in str(error.value)

    def test_no_config(self, copy):
        (copy / "config.json").unlink()
        self.refused(copy, "config.json is missing")

    def test_no_weights(self, copy):
        (copy / WEIGHTS).unlink()
        self.refused(copy, "has no weights")

    def test_pickles_alone(self, copy):
        (copy / WEIGHTS).rename(copy / "diffusion_pytorch_model.bin")
        self.refused(copy, "pickled ones")

    def test_truncated_weights(self, copy):
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-9])
        self.refused(copy, "cannot be loaded")

    @pytest.mark.parametrize(("content", "named"), [(POINTER, "git-lfs"), ("<!DOCTYPE html><html></html>", "web page")])
    def test_what_a_failed_download_leaves(self, copy, content, named):
        (copy / WEIGHTS).write_text(content)
        self.refused(copy, named)

    def test_missing_and_extra_tensors(self, copy):
        tensors = load_file(copy / WEIGHTS)
        tensors["decoder.conv_in.scale"] = tensors.pop("quant_conv.bias")
        save_file(tensors, copy / WEIGHTS)
        self.refused(copy, r"missing: quant_conv\.bias; unexpected: decoder\.conv_in\.scale")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"_class_name": "VQModel"}, "no AutoencoderKL"),
            ({"in_channels": 1}, "RGB"),
            ({"latent_channels": 5}, "conv_out"),
            ({"block_out_channels": [8, 16, 16]}, "3 levels"),
            ({"down_block_types": ["DownEncoderBlock2D", "MidBlock"]}, "down_block_types"),
        ],
    )
    def test_another_config(self, copy, changes, message):
        change_config(copy, **changes)
        self.refused(copy, message)


@pytest.mark.parametrize(
    "settings",
    [
        "{name: kl}",
        "{name: kl, pretrained: a/b, folder: c}",
        "{name: kl, train: {steps: 1, batch_size: 1, learning_rate: 1.0}}",
        "{name: autoencoder_kl, pretrained: a/b}",
        "{name: kl, pretrained: a/b, config: {latent_chanels: 4}}",
        "{name: kl, pretrained: a/b, objective: {mse: 1.0}}",
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path, settings):
    text = RECIPE.replace("texture:\n", f"texture: {settings}\nsemantic_was:\n")
    text = text[: text.index("semantic_was:")] + text[text.index("semantic:\n") :]
    with pytest.raises(SFDError):
        load_recipe(write_recipe(tmp_path, text))
