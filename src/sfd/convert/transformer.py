"""Published transformer checkpoints: their tensors under this project's names.

The published network embeds the channels of all streams, texture first, with one convolution and reads them out with
one linear layer; here each stream has its own. Both hold the same numbers: the convolution's input channels are split
by stream, and so are the output layer's rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sfd.latents import CompositeLatent, Stream
from sfd.models.dit_config import DiTConfig
from sfd.models.layers import rope_table, sincos_pos_embed
from sfd.utils.config import explain
from sfd.utils.errors import SFDError

WHAT = "published transformer"
EMBEDDING = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
OUTPUT = "final_layer.linear"
TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
# Published → ours, within a name. What is not here needs more than a new name, or has the same.
_NAMES = {
    "x_embedder.proj.bias": "embedding_bias",
    "y_embedder.embedding_table": "class_embedding",
    "final_layer.norm_final": "final_norm",
    "final_layer.adaLN_modulation.1": "final_modulation",
    "repa_projector": "projector",
    ".norm1": ".attention_norm",
    ".norm2": ".mlp_norm",
    ".attn.qkv": ".attention.qkv",
    ".attn.proj": ".attention.out",
    ".adaLN_modulation.1": ".modulation",
}
_CLOCKS = {"semantic": "t_embedder_sem", "texture": "t_embedder_tex"}
# The published tables are recomputed here; another processor may round them differently, and so does half precision.
_TABLE_TOLERANCE = 1e-4


def inferred_config(shapes: Mapping[str, tuple[int, ...]], semantic: int, repa_block: int = 2) -> DiTConfig:
    """Read a published network's configuration from the shapes of its tensors.

    Args:
        shapes: by published name.
        semantic: how many of the channels, the last ones, are the semantic stream's: shapes tell the sum only.
        repa_block: 1-based block whose tokens the projector takes, if there is one; shapes do not determine it.
    """
    try:
        width, channels, patch, _ = shapes[EMBEDDING]
        tokens, head = shapes["pos_embed"][1], shapes["blocks.0.attn.q_norm.weight"][0]
        projector = "repa_projector.0.weight" in shapes
        return DiTConfig(
            depth=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
            width=width,
            heads=width // head,
            composite=composite_of(channels, semantic, patch * math.isqrt(tokens), patch),
            num_classes=shapes[LABELS][0] - 1,
            clocks=("semantic", "texture") if "t_embedder_sem.mlp.0.weight" in shapes else (),
            repa_block=repa_block if projector else None,
            repa_width=shapes["repa_projector.0.weight"][0] if projector else 2048,
            repa_channels=shapes["repa_projector.4.weight"][0] if projector else None,
        )
    except KeyError as missing:
        raise SFDError(f"this is no {WHAT}: it lacks the tensor {missing}") from None
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise explain(error, DiTConfig, f"shapes of the {WHAT}") from None


def composite_of(channels: int, semantic: int, grid: int, patch: int) -> CompositeLatent:
    """Lay out the published streams: texture first, semantic last; no semantic channels: texture alone."""
    texture = Stream(name="texture", channels=channels - semantic, grid=grid, patch_size=patch)
    if not semantic:
        return CompositeLatent(streams=(texture,))
    return CompositeLatent(
        streams=(texture, Stream(name="semantic", channels=semantic, grid=grid, patch_size=patch, weight=2.0))
    )


def from_published(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Turn the published state dict into our transformer's; `component.assemble` accounts for every tensor.

    A network that was trained without label dropout has no row for the null class; here it gets one of zeros, which
    nothing trained.
    """
    ours = renamed(state, config)
    labels = ours.get("class_embedding.weight")
    if labels is not None and len(labels) == config.num_classes > 0:
        ours["class_embedding.weight"] = torch.cat([labels, labels.new_zeros(1, *labels.shape[1:])])
    for name, table in _tables(config).items():
        given = state.get(name, table)
        rounding = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
        if given.shape != table.shape or not (given.float() - table).abs().max() <= max(_TABLE_TOLERANCE, rounding):
            raise SFDError(f"{WHAT}: {name} is not the position table that this network computes")
    return ours


def renamed(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Give published tensors (or their gradients) our names and layouts; position tables are left out."""
    streams = config.composite.streams
    channels, patch = [s.channels for s in streams], streams[0].patch_size
    clocks = {_CLOCKS.get(clock, "t_embedder"): k for k, clock in enumerate(config.clocks or ("",))}
    ours: dict[str, Tensor] = {}
    try:
        for name, tensor in state.items():
            if name == EMBEDDING:
                columns = tensor.permute(0, 2, 3, 1).split(channels, dim=3)  # width, p, p, C
                ours |= {f"embeddings.{k}.weight": part.flatten(1).contiguous() for k, part in enumerate(columns)}
            elif name.startswith(OUTPUT):
                kind = name.removeprefix(f"{OUTPUT}.")
                rows = tensor.unflatten(0, (patch, patch, sum(channels))).split(channels, dim=2)
                ours |= {f"heads.{k}.{kind}": part.flatten(0, 2).contiguous() for k, part in enumerate(rows)}
            elif name.endswith("attn.q_norm.weight"):
                pair = torch.stack([tensor, state[name.replace("q_norm", "k_norm")]])
                ours[name.replace("attn.q_norm.weight", "attention.qk_weight")] = pair[:, None]
            elif name.startswith("t_embedder"):
                embedder, _, rest = name.partition(".")
                ours[f"time_embedders.{clocks[embedder]}.{rest}"] = tensor
            elif name not in TABLES and not name.endswith("attn.k_norm.weight"):
                ours[_renamed(name)] = tensor
    except (KeyError, RuntimeError) as error:
        raise SFDError(f"{WHAT}: {name} does not fit the other tensors ({error}); use the files of one model") from None
    return ours


def _renamed(name: str) -> str:
    for published, ours in _NAMES.items():
        name = name.replace(published, ours)
    return name


def _tables(config: DiTConfig) -> dict[str, Tensor]:
    """Compute the fixed position tables that a published checkpoint holds, by name."""
    grid = config.composite.token_grid
    angles = rope_table(config.width // config.heads, grid).repeat_interleave(2, dim=1)  # both channels of a pair
    return dict(zip(TABLES, (sincos_pos_embed(config.width, grid)[None], *angles.unbind(-1)), strict=True))
