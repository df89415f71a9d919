import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfd.convert import autoencoder as interop
from sfd.encoders import kl, load_encoder, open_texture
from sfd.run.recipe import EncoderSettings, load_recipe
from sfd.run.validate import planned_encoder
from sfd.utils.config import parse
from sfd.utils.errors import SFDError
from small_published import KL, save_kl
from tiny import RECIPE, write_recipe

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl") / "vae"
    return save_kl(folder), folder


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the folder, to damage."""
    return shutil.copytree(model[1], tmp_path / "vae")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """No model in the hub's cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_latents_are_the_posteriors_mean_unscaled(model):
    encoder = open_texture(str(model[1]))
    moments = model[0].quant_conv(model[0].encoder(images()))
    torch.testing.assert_close(encoder.encode(images()), moments.chunk(2, dim=1)[0])
    assert (encoder.channels, encoder.downsample) == (3, 2)


def test_decoding_is_the_models_own(model):
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model[0].decoder(model[0].post_quant_conv(latents))
    torch.testing.assert_close(open_texture(str(model[1])).decode(latents), expected)


def test_it_is_saved_as_a_part_that_needs_no_hub(model, tmp_path):
    encoder = open_texture(str(model[1]))
    encoder.save(tmp_path / "part")
    loaded = load_encoder(tmp_path / "part")
    assert loaded.identity == encoder.identity and not loaded.training
    assert torch.equal(loaded.encode(images()), encoder.encode(images()))
    assert open_texture(str(tmp_path / "part")).identity == encoder.identity


def test_identity_tells_weights_apart(model, copy):
    tensors = load_file(copy / WEIGHTS)
    tensors["quant_conv.bias"] += 1
    save_file(tensors, copy / WEIGHTS)
    assert kl.pretrained(str(copy), {}).identity != kl.pretrained(str(model[1]), {}).identity


def test_former_names_of_attention_are_known(model, copy):
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, tensor in load_file(copy / WEIGHTS).items():
        for present, before in former.items():
            name = name.replace(present, before)
        renamed[name] = tensor
    assert sum(".proj_attn." in name for name in renamed) == 2 * (2 + 1 + 2)  # both mids, a level down, two blocks up
    save_file(renamed, copy / WEIGHTS)
    assert kl.pretrained(str(copy), {}).identity == kl.pretrained(str(model[1]), {}).identity


def test_the_defaults_are_the_published_f16d32():
    keys = json.loads((GOLDEN / "keys_sdvae_f16d32.json").read_text())
    published = interop.inferred_config({name: tuple(shape) for name, shape in keys["state_dict"].items()})
    assert parse(kl.Config, kl.architecture({"_class_name": "AutoencoderKL", **published}, "here")) == kl.Config()
    with torch.device("meta"):
        encoder = kl.build(kl.Config())
    assert (encoder.channels, encoder.downsample) == (32, 16)
    assert sum(p.numel() for p in encoder.parameters()) == keys["parameters"]


def test_a_converted_checkpoint_gives_the_published_latents(tmp_path):
    state = load_file(GOLDEN / "ldm_vae.weights.safetensors")
    config = interop.inferred_config({name: tuple(tensor.shape) for name, tensor in state.items()})
    interop.from_published(state, config).save_pretrained(tmp_path)
    published = load_file(GOLDEN / "ldm_vae.io.safetensors")
    encoder = open_texture(str(tmp_path))
    torch.testing.assert_close(encoder.encode(published["images"]), published["mean"], rtol=1e-4, atol=1e-4)
    decoded = encoder.decode(published["mean"])
    torch.testing.assert_close(decoded, published["reconstruction_from_mean"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"])
def test_known_names_are_planned_without_weights(name):
    encoder = planned_encoder(EncoderSettings(name="kl", pretrained=name))
    assert (encoder.channels, encoder.downsample) == (4, 8)
    # The published size of this autoencoder.
    assert sum(p.numel() for p in encoder.parameters()) == 83_653_863


def test_a_folder_is_planned_from_its_config_alone(copy):
    (copy / WEIGHTS).unlink()
    encoder = planned_encoder(EncoderSettings(name="kl", pretrained=str(copy)))
    assert (encoder.channels, encoder.downsample) == (3, 2)
    assert all(p.is_meta for p in encoder.parameters())


def test_config_stands_for_a_folder_that_is_not_there_yet(model):
    config = {"latent_channels": 32, "norm_num_groups": 16}
    settings = EncoderSettings(name="kl", pretrained="weights/sdvae-f16d32", config=config)
    assert planned_encoder(settings).config == kl.Config(norm_num_groups=16)


def test_config_is_held_against_the_folder(model):
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in KL.items()}
    assert kl.pretrained(str(model[1]), given).channels == 3
    with pytest.raises(SFDError, match=r"`config` says latent_channels = 4, but .*config\.json has 3"):
        planned_encoder(EncoderSettings(name="kl", pretrained=str(model[1]), config={"latent_channels": 4}))


def test_a_name_in_the_local_cache_is_found_without_the_hub(model, tmp_path):
    repository = tmp_path / "cache" / "models--someone--some-vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model[1], repository / "snapshots" / ("0" * 40))
    assert planned_encoder(EncoderSettings(name="kl", pretrained="someone/some-vae")).downsample == 2
    assert open_texture("someone/some-vae").identity == open_texture(str(model[1])).identity


class TestBadSources:
    def refused(self, source, message):
        with pytest.raises(SFDError, match=message):
            open_texture(str(source))

    def test_unknown_name(self):
        self.refused("someone/some-vae", r"neither a folder nor .*`hf download someone/some-vae`.*with config.json")

    def test_known_name_offline(self):
        self.refused(
            "stabilityai/sd-vae-ft-mse", r"`hf download stabilityai/sd-vae-ft-mse`.*downloading it here failed"
        )

    def test_missing_folder(self, tmp_path):
        self.refused(tmp_path / "none", "neither a folder nor")

    def test_empty_folder(self, tmp_path):
        self.refused(tmp_path, r"diffusion_pytorch_model\.safetensors is missing")

    def test_no_config(self, copy):
        (copy / "config.json").unlink()
        self.refused(copy, r"no model in the diffusers format: config\.json is missing")

    def test_pickles_alone(self, copy):
        (copy / WEIGHTS).rename(copy / "diffusion_pytorch_model.bin")
        self.refused(copy, r"pickled weights only \(diffusion_pytorch_model\.bin\)")

    def test_truncated_weights(self, copy):
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-9])
        self.refused(copy, "is no intact safetensors file")

    def test_missing_and_extra_tensors(self, copy):
        tensors = load_file(copy / WEIGHTS)
        tensors["quant.bias"] = tensors.pop("quant_conv.bias")
        save_file(tensors, copy / WEIGHTS)
        self.refused(copy, r"missing: .*quant_conv\.bias; unexpected: .*quant\.bias")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"_class_name": "VQModel"}, "describes no AutoencoderKL but VQModel"),
            ({"in_channels": 1}, "3 channels in and out"),
            ({"latent_channels": 5}, r"misshapen: .*encoder\.conv_out"),
            ({"block_out_channels": [8, 16, 16]}, "3 levels, so"),
            ({"down_block_types": ["DownEncoderBlock2D", "MidBlock"]}, "down_block_types"),
        ],
    )
    def test_another_config(self, copy, changes, message):
        change_config(copy, **changes)
        self.refused(copy, message)

    def test_a_config_that_says_little(self, copy):
        change = json.loads((copy / "config.json").read_text())
        del change["latent_channels"]
        (copy / "config.json").write_text(json.dumps(change))
        self.refused(copy, "lacks latent_channels")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{name: kl}", "give exactly one of"),
        ("{name: kl, pretrained: a/b, folder: c}", "give exactly one of"),
        ("{name: kl, train: {steps: 1, batch_size: 1, learning_rate: 1.0}}", "'kl' cannot be trained here"),
        ("{name: autoencoder_kl, pretrained: a/b}", "no 'autoencoder_kl' encoder is published"),
        ("{name: kl, pretrained: a/b, config: {latent_chanels: 4}}", "did you mean 'latent_channels'"),
        ("{name: kl, pretrained: a/b, objective: {mse: 1.0}}", "has no training objective"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path, settings, message):
    text = RECIPE.replace("texture:\n", f"texture: {settings}\nsemantic_was:\n")
    text = text[: text.index("semantic_was:")] + text[text.index("semantic:\n") :]
    with pytest.raises(SFDError, match=message):
        load_recipe(write_recipe(tmp_path, text))
