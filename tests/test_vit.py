"""Published semantic encoders: features equal those of transformers' own model."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfd import encoders
from sfd.encoders import load_encoder, load_published, open_semantic, planned_encoder, save_semantic, vit
from sfd.utils.errors import SFDError
from small_published import VITS, change_config, offline, save_vit  # noqa: F401

WEIGHTS = "model.safetensors"
TILE, GRID = 16, 4
CHOICES = {"tile": TILE, "grid": GRID}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vits")
    return {name: (save_vit(folder / name, name), folder / name) for name in VITS}


@pytest.fixture
def copy(models, tmp_path):
    """A copy of one of the folders, to damage."""
    return shutil.copytree(models["dinov2_with_registers"][1], tmp_path / "vit")


def images(count: int = 2, height: int = TILE, width: int = TILE) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def expected(network, tiles: torch.Tensor) -> torch.Tensor:
    """Features (B, C, 4, 4) of the library's own model."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (tiles * 0.5 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    pixels = torch.nn.functional.interpolate(pixels, size=(GRID * 7,) * 2, mode="bicubic", align_corners=False)
    with torch.no_grad():
        tokens = network(pixels).last_hidden_state[:, -(GRID**2) :]
    return tokens.transpose(1, 2).unflatten(2, (GRID, GRID))


def test_a_large_one_is_saved_by_name_and_loaded_at_need(models, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "LARGE", 1000)
    source = shutil.copytree(models["dinov2"][1], tmp_path / "hub")
    encoder = load_published("vit", str(source), CHOICES)
    save_semantic(encoder, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["config.json"]
    assert planned_encoder("", None, str(tmp_path / "saved"), {}) == encoder.config
    loaded = open_semantic(tmp_path / "saved")
    save_semantic(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()
    assert loaded.identity == encoder.identity
    assert torch.equal(loaded.encode(images()), encoder.encode(images()))
    weights = load_file(source / WEIGHTS)
    save_file({name: value + 1 for name, value in weights.items()}, source / WEIGHTS, {"format": "pt"})
    with pytest.raises(SFDError, match=encoder.identity):
        open_semantic(tmp_path / "saved").to("cpu")


@pytest.mark.parametrize("name", VITS)
class TestEveryFamily:
    def test_features_are_the_patch_tokens(self, models, name):
        network, folder = models[name]
        encoder = vit.pretrained(str(folder), CHOICES)
        torch.testing.assert_close(encoder.encode(images()), expected(network, images()), rtol=1e-4, atol=1e-5)
        assert (encoder.channels, encoder.downsample) == (16, 4)
        assert not encoder.encode(images()).requires_grad and not encoder.training

    def test_tiles_are_encoded_independently(self, models, name):
        encoder = vit.pretrained(str(models[name][1]), CHOICES)
        whole = images(2, 2 * TILE, 3 * TILE)
        tiles = [[encoder.encode(tile) for tile in row.split(TILE, dim=3)] for row in whole.split(TILE, dim=2)]
        joined = torch.cat([torch.cat(row, dim=3) for row in tiles], dim=2)
        torch.testing.assert_close(encoder.encode(whole), joined, rtol=1e-4, atol=1e-5)

    def test_it_is_saved_as_a_component_that_needs_no_hub(self, models, name, tmp_path):
        encoder = vit.pretrained(str(models[name][1]), CHOICES)
        encoder.save(tmp_path / "part")
        loaded = load_encoder(tmp_path / "part")
        assert loaded.identity == encoder.identity
        assert torch.equal(loaded.encode(images()), encoder.encode(images()))
        assert open_semantic(tmp_path / "part").identity == encoder.identity

    def test_it_is_planned_from_its_config_alone(self, models, name, tmp_path):
        shutil.copy(models[name][1] / "config.json", tmp_path)
        planned = planned_encoder("vit", str(tmp_path), None, CHOICES)
        assert planned == vit.pretrained(str(models[name][1]), CHOICES).config
        assert (planned.channels, planned.downsample, planned.tile) == (16, 4, TILE)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Counted by hand from the shapes.
        ("facebook/dinov2-base", 86_580_480),
        ("facebook/dinov2-with-registers-small", 22_056_576 + 4 * 384),
        ("facebook/dinov2-with-registers-giant", 1_136_480_768 + 4 * 1536),
    ],
)
def test_published_names_are_planned_offline(name, parameters):
    config = vit.planned(name, {})
    with torch.device("meta"):
        assert sum(p.numel() for p in vit.build(config).parameters()) == parameters


class TestBadSources:
    def refused(self, source, message, **given):
        with pytest.raises(SFDError, match=message):
            vit.pretrained(str(source), {**CHOICES, **given})

    def test_a_name_that_is_not_downloaded(self):
        with pytest.raises(SFDError, match="hf download someone/some-vit"):
            vit.planned("someone/some-vit", CHOICES)
        self.refused("facebook/dinov2-with-registers-base", "hf download facebook")

    def test_truncated_weights(self, copy):
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-9])
        self.refused(copy, "cannot be loaded")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_hidden_layers": 1}, "config.json is damaged"),
            ({"num_register_tokens": 4}, "register_tokens"),
            ({"model_type": "dinov3_vit"}, "dinov3_vit"),
        ],
    )
    def test_a_wrong_config(self, copy, changes, message):
        change_config(copy, **changes)
        self.refused(copy, message)

    def test_sizes_that_do_not_divide_and_a_config_that_contradicts_the_model(self, copy):
        self.refused(copy, "hidden_size = 768, but .* has 16", hidden_size=768)
        self.refused(copy, "tile of 16 pixels", grid=5)
        with pytest.raises(SFDError, match="16×24"):
            vit.pretrained(str(copy), CHOICES).encode(images(1, 16, 24))
