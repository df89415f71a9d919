import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sfd.encoders import load_encoder, open_semantic, vit
from sfd.run.recipe import EncoderSettings
from sfd.run.validate import planned_encoder
from sfd.utils.errors import SFDError
from small_published import KL, VITS, save_vit

WEIGHTS = "model.safetensors"
TILE, GRID = 16, 4
CHOICES = {"tile": TILE, "grid": GRID}
# Mean and standard deviation as the models' own preprocessing has them.
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
COLOURS = {"clip_vision_model": CLIP, "siglip_vision_model": ([0.5] * 3, [0.5] * 3)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vits")
    return {name: (save_vit(folder / name, name), folder / name) for name in VITS}


@pytest.fixture
def copy(models, tmp_path):
    """A copy of one of the folders, to damage."""
    return shutil.copytree(models["dinov2_with_registers"][1], tmp_path / "vit")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """No model in the hub's cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def images(count: int = 2, height: int = TILE, width: int = TILE) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def prepared(tiles: torch.Tensor, name: str, patch_size: int) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in COLOURS.get(name, IMAGENET))
    pixels = (tiles * 0.5 + 0.5 - mean) / std
    return torch.nn.functional.interpolate(pixels, size=(GRID * patch_size,) * 2, mode="bicubic", align_corners=False)


def expected(network, name: str, tiles: torch.Tensor) -> torch.Tensor:
    """Features (B, C, 4, 4), by the library's own means."""
    pixels = prepared(tiles, name, network.config.patch_size)
    with torch.no_grad():
        if name == "vit_mae":
            # Nothing masked, and patches put back to where they were.
            network.config.mask_ratio = 0.0
            out = network.vit(pixels, interpolate_pos_encoding=True)
            places = out.ids_restore[..., None].expand(-1, -1, out.last_hidden_state.shape[-1])
            tokens = out.last_hidden_state[:, 1:].gather(1, places)
        elif name == "siglip_vision_model":
            tokens = network(pixels, interpolate_pos_encoding=True).last_hidden_state
        elif name == "clip_vision_model":
            tokens = network.post_layernorm(network(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:])
        else:
            tokens = network(pixels).last_hidden_state[:, {"dinov2": 1}.get(name, 1 + 3) :]
    assert tokens.shape[1] == GRID**2
    return tokens.transpose(1, 2).unflatten(2, (GRID, GRID))


@pytest.mark.parametrize("name", VITS)
class TestEveryFamily:
    def test_features_are_the_patch_tokens(self, models, name):
        network, folder = models[name]
        encoder = vit.pretrained(str(folder), CHOICES)
        torch.testing.assert_close(encoder.encode(images()), expected(network, name, images()), rtol=1e-4, atol=1e-5)
        assert (encoder.channels, encoder.downsample) == (16, 4)

    def test_tiles_are_encoded_by_themselves(self, models, name):
        encoder = vit.pretrained(str(models[name][1]), CHOICES)
        whole = encoder.encode(images(2, 2 * TILE, 3 * TILE))
        assert whole.shape == (2, 16, 2 * GRID, 3 * GRID)
        alone = [
            torch.cat([encoder.encode(tile) for tile in row.split(TILE, dim=3)], dim=3)
            for row in images(2, 2 * TILE, 3 * TILE).split(TILE, dim=2)
        ]
        torch.testing.assert_close(whole, torch.cat(alone, dim=2), rtol=1e-4, atol=1e-5)

    def test_encoding_again_gives_the_same(self, models, name):
        encoder = vit.pretrained(str(models[name][1]), CHOICES)
        assert torch.equal(encoder.encode(images()), encoder.encode(images()))
        assert not encoder.encode(images()).requires_grad and not encoder.training

    def test_it_is_saved_as_a_part_that_needs_no_hub(self, models, name, tmp_path):
        if name in ("clip_vision_model", "siglip_vision_model"):
            pytest.skip("no recipe uses it")
        encoder = vit.pretrained(str(models[name][1]), CHOICES)
        encoder.save(tmp_path / "part")
        loaded = load_encoder(tmp_path / "part")
        assert loaded.identity == encoder.identity
        assert torch.equal(loaded.encode(images()), encoder.encode(images()))
        assert open_semantic(str(tmp_path / "part")).identity == encoder.identity

    def test_it_is_planned_from_its_config_alone(self, models, name, tmp_path):
        shutil.copy(models[name][1] / "config.json", tmp_path)
        planned = planned_encoder(EncoderSettings(name="vit", pretrained=str(tmp_path), config=CHOICES))
        assert planned.config == vit.pretrained(str(models[name][1]), CHOICES).config
        assert all(p.is_meta for p in planned.parameters())


def test_identity_tells_tiles_apart(models):
    folder = str(models["dinov2"][1])
    assert vit.pretrained(folder, CHOICES).identity == vit.pretrained(folder, CHOICES).identity
    assert vit.pretrained(folder, CHOICES).identity != vit.pretrained(folder, {"tile": 32, "grid": 4}).identity


def test_a_crop_of_256_pixels_is_seen_at_224_on_a_grid_of_16():
    """The published preprocessing, written out: [0, 1], ImageNet's colours, bicubic to 224."""
    encoder = vit.build(vit.Config(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8))
    crop = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (((crop + 1) / 2).movedim(1, 3) - mean) / std
    seen = torch.nn.functional.interpolate(pixels.movedim(3, 1), (224, 224), mode="bicubic")
    torch.testing.assert_close(encoder.prepare(crop), seen)
    assert encoder.encode(crop).shape == (1, 8, 16, 16) and encoder.downsample == 16
    assert encoder.encode(crop.repeat(1, 1, 2, 2)).shape == (1, 8, 32, 32)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_of_a_model_of_images_and_text_is_taken(models, kind, tmp_path):
    tower = models[f"{kind}_vision_model"][0]
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    config = getattr(transformers, f"{name}Config")(vision_config=tower.config.to_dict(), text_config=text)
    both = getattr(transformers, f"{name}Model")(config)
    both.vision_model.load_state_dict(tower.state_dict())
    both.save_pretrained(tmp_path)
    # Published files hold this table too, which the library once saved.
    tensors = load_file(tmp_path / WEIGHTS) | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    encoder = vit.pretrained(str(tmp_path), CHOICES)
    assert encoder.identity == vit.pretrained(str(models[f"{kind}_vision_model"][1]), CHOICES).identity


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        # Counted by hand from the shapes; heads, decoders and text towers left out.
        ("facebook/dinov2-with-registers-small", 22_056_576 + 4 * 384, 384),
        ("facebook/dinov2-with-registers-base", 86_580_480 + 4 * 768, 768),
        ("facebook/dinov2-base", 86_580_480, 768),
        ("facebook/dinov2-with-registers-large", 304_368_640 + 4 * 1024, 1024),
        ("facebook/dinov2-with-registers-giant", 1_136_480_768 + 4 * 1536, 1536),
        ("facebook/vit-mae-base", 85_798_656, 768),
        ("openai/clip-vit-base-patch16", 85_799_424, 768),
        ("google/siglip-base-patch16-256", 85_843_200, 768),
    ],
)
def test_known_names_are_planned_without_weights(name, parameters, channels):
    encoder = planned_encoder(EncoderSettings(name="vit", pretrained=name))
    assert (encoder.channels, encoder.downsample) == (channels, 16)
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def test_weights_in_several_files_are_read(models, tmp_path):
    network, folder = models["dinov2"]
    network.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert vit.pretrained(str(tmp_path), CHOICES).identity == vit.pretrained(str(folder), CHOICES).identity


class TestBadSources:
    def refused(self, source, message, **given):
        with pytest.raises(SFDError, match=message):
            vit.pretrained(str(source), {**CHOICES, **given})

    def test_unknown_name(self):
        with pytest.raises(SFDError, match=r"neither a folder nor .*`hf download someone/some-vit`"):
            open_semantic("someone/some-vit")

    def test_unknown_name_is_not_planned_with_the_defaults(self):
        with pytest.raises(SFDError, match="neither a folder nor"):
            planned_encoder(EncoderSettings(name="vit", pretrained="someone/some-vit", config=CHOICES))

    def test_known_name_offline(self):
        self.refused("facebook/dinov2-with-registers-base", "downloading it here failed")

    def test_no_config(self, copy):
        (copy / "config.json").unlink()
        self.refused(copy, r"no model in the transformers format: config\.json is missing")

    def test_no_weights(self, copy):
        (copy / WEIGHTS).unlink()
        self.refused(copy, r"has no weights: model\.safetensors is missing")

    def test_pickles_alone(self, copy):
        (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
        self.refused(copy, r"pickled weights only \(pytorch_model\.bin\)")

    def test_truncated_weights(self, copy):
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-9])
        self.refused(copy, "no intact safetensors")

    def test_missing_tensors(self, copy):
        tensors = load_file(copy / WEIGHTS)
        del tensors["layernorm.weight"]
        save_file(tensors, copy / WEIGHTS, {"format": "pt"})
        self.refused(copy, r"missing: layernorm\.weight")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_hidden_layers": 1}, r"unexpected: encoder\.layer\.1"),
            ({"num_register_tokens": 4}, r"misshapen: embeddings\.register_tokens"),
            ({"model_type": "resnet"}, "no supported model_type 'resnet'"),
            ({"model_type": "dinov3_vit"}, "no supported model_type 'dinov3_vit'"),
            ({"patch_size": "7"}, "is damaged: .*patch_size"),
            ({"hidden_act": "golu"}, "hidden_act"),
            ({"patch_size": [7, 7]}, "patch_size"),
        ],
    )
    def test_another_config(self, copy, changes, message):
        path = copy / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        self.refused(copy, message)

    def test_config_is_held_against_the_folder(self, copy):
        self.refused(copy, r"`config` says hidden_size = 768, but .* has 16", hidden_size=768)

    def test_images_that_are_no_whole_number_of_tiles(self, copy):
        with pytest.raises(SFDError, match=r"images of 16×24 are no whole number .*16×16.*set `tile`"):
            vit.pretrained(str(copy), CHOICES).encode(images(1, 16, 24))

    def test_a_tile_that_the_grid_does_not_divide(self, copy):
        self.refused(copy, "tile of 16 pixels does not divide into 5", grid=5)


def test_published_encoders_need_no_torchvision(models, tmp_path):
    """Even where one is installed that cannot be imported, and without a word on the way."""
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import sfd
from sfd.encoders import kl, vit
vit.pretrained({str(models["clip_vision_model"][1])!r}, {CHOICES})
kl.build(kl.Config(**{KL}))
assert not [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
