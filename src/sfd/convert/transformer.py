"""Published transformer checkpoints: their tensor names and layouts to ours and back.

The published network embeds the channels of all streams, texture first, with one convolution and reads them out with
one linear layer; here each stream has its own. Both hold the same numbers: the convolution's input channels are split
by stream, and so are the output layer's rows. Every tensor is accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfd.latents import CompositeLatent, Stream
from sfd.models.component import require_match, shapes
from sfd.models.dit import DiTConfig, LightningDiT
from sfd.models.layers import position_table
from sfd.utils.config import explain
from sfd.utils.errors import SFDError

TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
EMBEDDING = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
# Ours → published. What is not here needs more than a new name.
_NAMES = {
    "embedding_bias": "x_embedder.proj.bias",
    "class_embedding.weight": LABELS,
    "final_norm.weight": "final_layer.norm_final.weight",
}
_MODULES = {"final_modulation": "final_layer.adaLN_modulation.1", "projector": "repa_projector"}
_BLOCK = {
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.w12": "mlp.w12",
    "mlp.w3": "mlp.w3",
    "modulation": "adaLN_modulation.1",
}
_COMPOSITES = (("texture", "semantic"), ("texture",))
_CLOCKS = {"semantic": "t_embedder_sem", "texture": "t_embedder_tex"}
# The published tables are recomputed here; another processor may round them differently, and so does half precision.
_TABLE_TOLERANCE = 1e-4
_FEATURES = {"s": 384, "b": 768, "l": 1024, "g": 1536}  # channels of DINOv2, by the letter after "vit"


def published_config(values: Mapping[str, Any]) -> DiTConfig:
    """Read the published network's configuration (`dit_*.json`, field `config`).

    Raises:
        SFDError: a field is missing, or asks for another architecture than the published models have.
    """
    try:
        for flag, expected in _SWITCHES.items():
            if values[flag] is not expected:
                raise SFDError(f"published configuration has {flag} = {values[flag]!r}; only {expected!r} is supported")
        semantic, offset, repa = values["semantic_chans"], values["semfirst_delta_t"], values["use_repa"]
        return DiTConfig(
            depth=values["depth"],
            width=values["hidden_size"],
            heads=values["num_heads"],
            composite=_composite(values["in_channels"], semantic, values["input_size"], values["patch_size"]),
            num_classes=values["num_classes"],
            clocks=("semantic", "texture") if offset > 0 else (),
            repa_block=values["repa_depth"] if repa else None,
            repa_width=values["repa_projector_dim"] if repa else 2048,
            repa_channels=_feature_channels(values["repa_dino_version"]) if repa else None,
        )
    except KeyError as missing:
        raise SFDError(f"published configuration lacks the field {missing}") from None
    except (TypeError, ValueError) as error:
        raise explain(error, DiTConfig, "published configuration") from None


def inferred_config(shapes: Mapping[str, tuple[int, ...]], semantic: int, repa_block: int = 2) -> DiTConfig:
    """Read a published network's configuration from the shapes of its tensors.

    Args:
        shapes: by published name; missing, spare and misshapen ones are found when they are compared with
            `published_shapes` of what this returns.
        semantic: how many of the channels, the last ones, are the semantic stream's: shapes tell the sum only.
        repa_block: 1-based block whose tokens the projector takes, if there is one; shapes do not tell it.

    Raises:
        SFDError: a tensor that tells a size is missing or impossible.
    """
    try:
        width, channels, patch, _ = shapes[EMBEDDING]
        tokens, head = shapes["pos_embed"][1], shapes["blocks.0.attn.q_norm.weight"][0]
        projector = "repa_projector.0.weight" in shapes
        return DiTConfig(
            depth=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
            width=width,
            heads=width // head,
            composite=_composite(channels, semantic, patch * math.isqrt(tokens), patch),
            num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
            clocks=("semantic", "texture") if "t_embedder_sem.mlp.0.weight" in shapes else (),
            repa_block=repa_block if projector else None,
            repa_width=shapes["repa_projector.0.weight"][0] if projector else 2048,
            repa_channels=shapes["repa_projector.4.weight"][0] if projector else None,
        )
    except KeyError as missing:
        raise SFDError(f"this is no published transformer: it lacks the tensor {missing}") from None
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise explain(error, DiTConfig, "shapes of the published transformer") from None


def _composite(channels: int, semantic: int, grid: int, patch: int) -> CompositeLatent:
    """Texture first, semantic last, as published; no semantic channels: texture alone."""
    texture = Stream(name="texture", channels=channels - semantic, grid=grid, patch_size=patch)
    if not semantic:
        return CompositeLatent(streams=(texture,))
    return CompositeLatent(
        streams=(texture, Stream(name="semantic", channels=semantic, grid=grid, patch_size=patch, weight=2.0))
    )


_SWITCHES = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False}


def _feature_channels(version: str) -> int:
    letter = version.partition("_vit")[2][:1]
    if letter not in _FEATURES:
        raise SFDError(f"unknown encoder {version!r} in published configuration; expected one like 'dinov2_vitb14_reg'")
    return _FEATURES[letter]


def to_published(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Turn our transformer's state dict into the published one's, position tables included.

    Raises:
        SFDError: tensors are missing, left over or misshapen for `config`, or the published network cannot hold this
            composite (it knows the streams texture and semantic, on one grid).
    """
    with torch.device("meta"):
        expected = shapes(LightningDiT(config))
    require_match(state, expected, "transformer")
    return _publish(state, config)


def from_published(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Turn the published state dict into our transformer's, for `load_state_dict(…, strict=True)`.

    A network that was trained without label dropout has no row for the null class; here it gets one of zeros, which
    nothing trained.

    Raises:
        SFDError: tensors are missing, left over or misshapen for `config`, or the checkpoint's position tables are not
            those that this network computes.
    """
    table = state.get(LABELS)
    if table is not None and len(table) == config.num_classes > 0:
        state = {**state, LABELS: torch.cat([table, table.new_zeros(1, *table.shape[1:])])}
    require_match(state, published_shapes(config), "published transformer")
    for name, table in tables(config).items():
        given = state[name]
        rounding = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
        error = (given.float().cpu() - table).abs().max().item()
        if not error <= max(_TABLE_TOLERANCE, rounding):
            raise SFDError(f"published transformer: {name} differs by {error:.2g} from the table this network computes")
    ours = {name: state[theirs] for name, theirs in _renamed(config).items()}
    streams = config.composite.streams
    channels = [s.channels for s in streams]
    convolution = state[EMBEDDING].permute(0, 2, 3, 1).split(channels, dim=3)  # width, p, p, C
    for k, columns in enumerate(convolution):
        ours[f"embeddings.{k}.weight"] = columns.flatten(1).contiguous()
    patch = streams[0].patch_size
    for kind in ("weight", "bias"):
        rows = state[f"final_layer.linear.{kind}"].unflatten(0, (patch, patch, sum(channels))).split(channels, dim=2)
        for k, part in enumerate(rows):
            ours[f"heads.{k}.{kind}"] = part.flatten(0, 2).contiguous()
    for b in range(config.depth):
        pair = [state[f"blocks.{b}.attn.{name}_norm.weight"] for name in "qk"]
        ours[f"blocks.{b}.attention.qk_weight"] = torch.stack(pair)[:, None]
    return ours


def published_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the published checkpoint of this network.

    Raises:
        SFDError: the published network cannot hold this composite.
    """
    with torch.device("meta"):
        published = _publish(LightningDiT(config).state_dict(), config)
    return {name: tuple(tensor.shape) for name, tensor in published.items()}


def _publish(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    streams = config.composite.streams
    if len({(s.grid, s.patch_size) for s in streams}) > 1 or config.composite.names not in _COMPOSITES:
        given = ", ".join(f"{s.name} {s.grid}×{s.grid} patch {s.patch_size}" for s in streams)
        raise SFDError(f"the published network holds the streams texture, semantic on one grid; this one has {given}")
    theirs = {name: state[ours] for ours, name in _renamed(config).items()}
    patch = streams[0].patch_size
    columns = [state[f"embeddings.{k}.weight"].unflatten(1, (patch, patch, s.channels)) for k, s in enumerate(streams)]
    theirs[EMBEDDING] = torch.cat(columns, dim=3).permute(0, 3, 1, 2).contiguous()
    for kind in ("weight", "bias"):
        rows = [state[f"heads.{k}.{kind}"].unflatten(0, (patch, patch, s.channels)) for k, s in enumerate(streams)]
        theirs[f"final_layer.linear.{kind}"] = torch.cat(rows, dim=2).flatten(0, 2)
    for b in range(config.depth):
        for name, weight in zip("qk", state[f"blocks.{b}.attention.qk_weight"][:, 0], strict=True):
            theirs[f"blocks.{b}.attn.{name}_norm.weight"] = weight.contiguous()
    return theirs | tables(config)


def tables(config: DiTConfig) -> dict[str, Tensor]:
    """Compute the fixed position tables that a published checkpoint holds beside its weights, by name."""
    grid = config.composite.token_grid
    angle = _published_angles(config.width // config.heads, grid)
    return dict(zip(TABLES, (position_table(config.width, grid)[None], angle.cos(), angle.sin()), strict=True))


def _published_angles(head_width: int, grid: int) -> Tensor:
    """Compute the rotary embedding's angles (grid², head_width) in float32, to the published tables' last bit.

    The network's own (`rotary_table`) are the same numbers, computed in float64.
    """
    half = head_width // 2
    frequency = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)
    place = torch.arange(grid) / grid * grid
    axis = (place[:, None] * frequency).repeat_interleave(2, dim=1)  # both channels of a pair
    row, column = axis[:, None].expand(grid, grid, -1), axis.expand(grid, grid, -1)
    return torch.cat([row, column], dim=2).flatten(0, 1)


def _renamed(config: DiTConfig) -> dict[str, str]:
    """Our name → the published one, for all tensors that are the same in both."""
    names = dict(_NAMES)
    modules = {ours: theirs for ours, theirs in _MODULES.items() if ours != "projector"}
    if config.repa_channels is not None:
        modules |= {f"projector.{i}": f"{_MODULES['projector']}.{i}" for i in (0, 2, 4)}
    for k, clock in enumerate(config.clocks or ("",)):
        for i in (0, 2):
            modules[f"time_embedders.{k}.mlp.{i}"] = f"{_CLOCKS.get(clock, 't_embedder')}.mlp.{i}"
    for b in range(config.depth):
        modules |= {f"blocks.{b}.{ours}": f"blocks.{b}.{theirs}" for ours, theirs in _BLOCK.items()}
    for ours, theirs in modules.items():
        names[f"{ours}.weight"] = f"{theirs}.weight"
        if not ours.endswith("_norm"):
            names[f"{ours}.bias"] = f"{theirs}.bias"
    return names
