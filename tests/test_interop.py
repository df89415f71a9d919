"""Every tensor of the published checkpoints is accounted for; their numbers are compared in tests/reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfd.convert import autoencoder, semvae
from sfd.convert import transformer as interop
from sfd.latents import CompositeLatent, Stream
from sfd.models.dit import SIZES, DiTConfig, LightningDiT
from sfd.models.semvae import SemVAEConfig
from sfd.utils.errors import SFDError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=["dit_sfd", "dit_sync"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_round_trip_is_exact(name):
    state = load_file(GOLDEN / f"{name}.weights.safetensors")
    config = interop.published_config(json.loads((GOLDEN / f"{name}.json").read_text())["config"])
    back = interop.to_published(interop.from_published(state, config), config)
    assert back.keys() == state.keys()
    for key in state:
        assert torch.equal(back[key], state[key]), key


def published_size(size: str) -> DiTConfig:
    streams = Stream(name="texture", channels=32, grid=16), Stream(name="semantic", channels=16, grid=16, weight=2.0)
    return DiTConfig(
        **SIZES[size]._asdict(),
        composite=CompositeLatent(streams=streams),
        num_classes=1000,
        clocks=("semantic", "texture"),
        repa_block=2,
        repa_channels=768,
    )


@pytest.mark.parametrize(("size", "file"), [("B", "b-1"), ("L", "l-1"), ("XL", "xl-1"), ("XXL", "1p0b-1")])
def test_published_sizes(size, file):
    """Shapes tell the whole configuration of each published network."""
    keys = json.loads((GOLDEN / f"keys_lightningdit-{file}.json").read_text())
    shapes = {name: tuple(shape) for name, shape in keys["state_dict"].items()}
    assert interop.inferred_config(shapes, semantic=16) == published_size(size)


@pytest.fixture
def published() -> tuple[dict[str, Tensor], DiTConfig]:
    config = interop.published_config(json.loads((GOLDEN / "dit_sfd.json").read_text())["config"])
    return load_file(GOLDEN / "dit_sfd.weights.safetensors"), config


def test_missing_tensor_is_named(published):
    state, config = published
    del state["blocks.1.norm1.weight"]
    with pytest.raises(SFDError, match=r"missing: blocks\.1\.norm1\.weight"):
        interop.from_published(state, config)


def test_left_over_tensor_is_named(published):
    state, config = published
    with pytest.raises(SFDError, match=r"unexpected: blocks\.7\.norm1\.weight"):
        interop.from_published(state | {"blocks.7.norm1.weight": torch.ones(64)}, config)


def test_misshapen_tensor_is_named(published):
    state, config = published
    with pytest.raises(SFDError, match=r"norm_final\.weight \(32,\) for \(64,\)"):
        interop.from_published(state | {"final_layer.norm_final.weight": torch.ones(32)}, config)


@pytest.mark.parametrize("table", ["pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_other_position_tables_are_refused(published, table):
    state, config = published
    with pytest.raises(SFDError, match=f"{table} differs"):
        interop.from_published(state | {table: state[table].flip(-2)}, config)


def test_unequal_grids_cannot_be_published():
    streams = Stream(name="texture", channels=4, grid=8, patch_size=2), Stream(name="semantic", channels=8, grid=4)
    config = DiTConfig(depth=1, width=32, heads=2, composite=CompositeLatent(streams=streams), num_classes=0)
    with pytest.raises(SFDError, match="on one grid"):
        interop.to_published(LightningDiT(config).state_dict(), config)


def test_another_architecture_is_refused():
    values = json.loads((GOLDEN / "dit_sfd.json").read_text())["config"]
    with pytest.raises(SFDError, match="use_swiglu = False"):
        interop.published_config(values | {"use_swiglu": False})
    with pytest.raises(SFDError, match="'depth'"):
        interop.published_config({key: value for key, value in values.items() if key != "depth"})


def test_a_network_without_a_null_class_gets_one(published):
    state, config = published
    state[interop.LABELS] = state[interop.LABELS][:-1]
    table = interop.from_published(state, config)["class_embedding.weight"]
    assert torch.equal(table[:-1], state[interop.LABELS]) and not table[-1].any()


class TestSemVAE:
    @pytest.fixture
    def tensors(self) -> dict[str, Tensor]:
        return load_file(GOLDEN / "semvae.weights.safetensors")

    def test_round_trip_is_exact(self, tensors):
        back = semvae.to_published(semvae.from_published(tensors, semvae.inferred_config(shapes(tensors), heads=4)))
        assert back.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(back[key], tensor), key

    def test_shapes_tell_all_but_the_heads(self):
        keys = json.loads((GOLDEN / "keys_semvae.json").read_text())["state_dict"]
        assert semvae.inferred_config({name: tuple(shape) for name, shape in keys.items()}) == SemVAEConfig()

    def test_an_unknown_tensor_is_refused(self, tensors):
        config = semvae.inferred_config(shapes(tensors), heads=4)
        tensors["encoder.1.extra"] = tensors.pop("decoder.3.bias")
        with pytest.raises(SFDError, match=r"missing: decoder\.3\.bias; unexpected: encoder\.1\.extra"):
            semvae.from_published(tensors, config)

    def test_other_checkpoints_are_refused(self):
        with pytest.raises(SFDError, match="no published SemVAE checkpoint"):
            semvae.inferred_config({"blocks.0.weight": (1,)})


class TestAutoencoder:
    @pytest.fixture
    def tensors(self) -> dict[str, Tensor]:
        return load_file(GOLDEN / "ldm_vae.weights.safetensors")

    def test_round_trip_is_exact(self, tensors):
        network = autoencoder.from_published(tensors, autoencoder.inferred_config(shapes(tensors)))
        back = autoencoder.to_published(network)
        assert back.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(back[key], tensor), key

    def test_a_missing_tensor_is_named(self, tensors):
        del tensors["decoder.up.0.block.1.conv2.bias"]
        with pytest.raises(SFDError, match=r"missing: decoder\.up\.0\.block\.1\.conv2\.bias"):
            autoencoder.from_published(tensors, autoencoder.inferred_config(shapes(tensors)))

    def test_channels_that_do_not_divide_into_groups_are_refused(self, tensors):
        config = autoencoder.inferred_config(shapes(tensors)) | {"block_out_channels": [32, 48]}
        with pytest.raises(SFDError, match="no LDM autoencoder of these shapes"):
            autoencoder.published_shapes(config)


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
