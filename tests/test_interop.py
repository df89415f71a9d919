"""The published network's numbers, through its own weights, and every tensor of its checkpoints accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfd import flow, interop
from sfd.errors import SFDError
from sfd.models.transformer import SIZES, Transformer, TransformerConfig, parameter_count
from sfd.streams import Composite, Stream

GOLDEN = Path(__file__).parent / "golden"


def network(name: str, weights: str = "weights", config: str = "config") -> Transformer:
    settings = interop.published_config(json.loads((GOLDEN / f"{name}.json").read_text())[config])
    model = Transformer(settings)
    model.load_state_dict(interop.from_published(load_file(GOLDEN / f"{name}.{weights}.safetensors"), settings))
    return model.eval()


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.io.safetensors")


def velocity(model: Transformer, io: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
    times = torch.stack([io["t_texture"], io.get("t_semantic", io["t_texture"])], dim=1)  # one clock: one time
    with torch.no_grad():
        return model(io["x"].flatten(1), times, io["y"] if labels is None else labels).velocity


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest entry."""
    error = (ours.reshape(theirs.shape) - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.2g}"


@pytest.fixture(params=["dit_sfd", "dit_sync"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_velocity(name):
    close(velocity(network(name), golden(name)), golden(name)["velocity"])


def test_classifier_free_guidance(name):
    model, io = network(name), golden(name)
    scale = json.loads((GOLDEN / f"{name}.json").read_text())["cfg_scale"]
    weak = velocity(model, io, torch.full_like(io["y"], model.null_class))
    close(weak + scale * (velocity(model, io) - weak), io["velocity_cfg"])


def test_autoguidance():
    io = golden("dit_sfd")
    model, guide = network("dit_sfd"), network("dit_sfd", "guide_weights", "guide_config")
    strong, weak = velocity(model, io), velocity(guide, io)
    close(weak + 1.5 * (strong - weak), io["velocity_autoguided"])
    scales = model.config.composite.expand(torch.tensor([1.3, 1.9]))
    close(weak + scales * (strong - weak), io["velocity_autoguided_sem1p9_tex1p3"])


def losses(name: str, model: Transformer) -> dict[str, Tensor]:
    io, composite = golden(name), model.config.composite
    u = io["loss_base_time"]
    delta = 0.3 if name == "dit_sfd" else 0.0
    times = torch.stack([((1 + delta) * u - delta).clamp(min=0), ((1 + delta) * u).clamp(max=1)], dim=1)
    x1, x0 = io["loss_x1"].flatten(1), io["loss_x0"].flatten(1)
    out = model(flow.interpolate(x1, x0, composite.expand(times)), times, io["y"], project=True)
    target = flow.velocity_target(x1, x0)
    weights = composite.expand(torch.tensor([s.weight for s in composite.streams]))
    return {
        "loss_velocity": flow.velocity_loss(out.velocity, target, weights),
        "loss_cosine": flow.cosine_loss(composite.positions(out.velocity), composite.positions(target)),
        "loss_repa": flow.repa_loss(out.projection, io["loss_features"]),
    }


def test_losses_per_sample(name):
    io, ours = golden(name), losses(name, network(name))
    for key, value in ours.items():
        close(value.detach(), io[key])
    close(sum(value.mean() for value in ours.values()).detach(), io["loss_total"])


def test_gradients(name):
    io, model = golden(name), network(name)
    sum(value.mean() for value in losses(name, model).values()).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    gradients = interop.to_published(gradients, model.config)  # gradients lie where their weights lie
    for key in (key for key in io if key.startswith("grad.")):
        close(gradients[key.removeprefix("grad.")], io[key])


def test_round_trip_is_exact(name):
    state = load_file(GOLDEN / f"{name}.weights.safetensors")
    config = interop.published_config(json.loads((GOLDEN / f"{name}.json").read_text())["config"])
    back = interop.to_published(interop.from_published(state, config), config)
    assert back.keys() == state.keys()
    for key in state.keys() - {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}:
        assert torch.equal(back[key], state[key]), key


def published_size(size: str) -> TransformerConfig:
    streams = Stream(name="texture", channels=32, grid=16), Stream(name="semantic", channels=16, grid=16)
    return TransformerConfig(
        **SIZES[size]._asdict(),
        composite=Composite(streams=streams),
        num_classes=1000,
        clocks=("semantic", "texture"),
        repa_block=2,
        repa_channels=768,
    )


@pytest.mark.parametrize(("size", "file"), [("B", "b-1"), ("L", "l-1"), ("XL", "xl-1"), ("XXL", "1p0b-1")])
def test_published_sizes(size, file):
    keys = json.loads((GOLDEN / f"keys_lightningdit-{file}.json").read_text())
    config = published_size(size)
    assert SIZES[size] == (keys["depth"], keys["hidden_size"], keys["num_heads"])
    assert {key: list(shape) for key, shape in interop.published_shapes(config).items()} == keys["state_dict"]
    # The published count holds the fixed position embedding, which is no parameter here.
    assert parameter_count(config) + 256 * config.width == keys["parameters"]


@pytest.fixture
def published() -> tuple[dict[str, Tensor], TransformerConfig]:
    config = interop.published_config(json.loads((GOLDEN / "dit_sfd.json").read_text())["config"])
    return load_file(GOLDEN / "dit_sfd.weights.safetensors"), config


def test_missing_tensor_is_named(published):
    state, config = published
    del state["blocks.1.norm1.weight"]
    with pytest.raises(SFDError, match=r"missing: blocks\.1\.norm1\.weight"):
        interop.from_published(state, config)


def test_left_over_tensor_is_named(published):
    state, config = published
    with pytest.raises(SFDError, match=r"left over: blocks\.7\.norm1\.weight"):
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
    config = TransformerConfig(depth=1, width=32, heads=2, composite=Composite(streams=streams), num_classes=0)
    with pytest.raises(SFDError, match="on one grid"):
        interop.to_published(Transformer(config).state_dict(), config)


def test_another_architecture_is_refused():
    values = json.loads((GOLDEN / "dit_sfd.json").read_text())["config"]
    with pytest.raises(SFDError, match="use_swiglu = False"):
        interop.published_config(values | {"use_swiglu": False})
    with pytest.raises(SFDError, match="'depth'"):
        interop.published_config({key: value for key, value in values.items() if key != "depth"})
