"""Published SemVAE checkpoints: their tensor names to ours and back; the tensors themselves are the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sfd.models.component import require_match, shapes
from sfd.models.semvae import SemVAE, SemVAEConfig
from sfd.utils.config import explain
from sfd.utils.errors import SFDError

# Names within a published block and ours; a tower is embed, blocks, norm, head in one nn.Sequential there.
_BLOCK = {
    "norm1": "norm1",
    "attn.in_proj_": "qkv.",
    "attn.out_proj": "attention_out",
    "norm2": "norm2",
    "mlp.0": "mlp_in",
    "mlp.2": "mlp_out",
}
WHAT = "published SemVAE"


def published_names(blocks: int) -> dict[str, str]:
    """Map every tensor name of a published SemVAE checkpoint to the name it has here."""
    names = {}
    for tower in ("encoder", "decoder"):
        parts = {f"{tower}.0": "embed", f"{tower}.{blocks + 1}": "norm", f"{tower}.{blocks + 2}": "head"}
        for block in range(blocks):
            parts |= {f"{tower}.{block + 1}.{a}": f"blocks.{block}.{b}" for a, b in _BLOCK.items()}
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                dot = "" if theirs.endswith("_") else "."
                names[f"{theirs}{dot}{kind}"] = f"{tower}.{ours.removesuffix('.')}.{kind}"
    return names


def published_shapes(config: SemVAEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the published checkpoint of this SemVAE."""
    with torch.device("meta"):
        ours = shapes(SemVAE(config))
    return {theirs: ours[name] for theirs, name in published_names(config.blocks).items()}


def inferred_config(shapes: Mapping[str, tuple[int, ...]], heads: int = 6) -> SemVAEConfig:
    """Read the configuration from the shapes of a published checkpoint's tensors.

    Args:
        shapes: by published name.
        heads: attention heads, the one thing that shapes do not tell.

    Raises:
        SFDError: a tensor that tells a size is missing or impossible.
    """
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("encoder.")}) - 3
    first, last = shapes.get("encoder.0.weight"), shapes.get(f"encoder.{blocks + 2}.weight")
    if blocks < 1 or first is None or last is None:
        raise SFDError(
            "this is no published SemVAE checkpoint: it needs tensors encoder.0.weight, encoder.1.norm1.weight, … "
            f"and has {', '.join(sorted(shapes)[:3]) or 'none'}; give the file's state dictionary"
        )
    try:
        return SemVAEConfig(
            input_channels=first[1], latent_channels=last[0] // 2, width=first[0], heads=heads, blocks=blocks
        )
    except (ValueError, IndexError) as error:
        raise explain(error, SemVAEConfig, f"shapes of the {WHAT}") from None


def from_published(tensors: Mapping[str, Tensor], config: SemVAEConfig) -> SemVAE:
    """Build a SemVAE with the tensors of a published checkpoint.

    Raises:
        SFDError: a tensor is missing, unknown or misshapen.
    """
    require_match(tensors, published_shapes(config), WHAT)
    model = SemVAE(config)
    model.load_state_dict({ours: tensors[theirs] for theirs, ours in published_names(config.blocks).items()})
    return model


def to_published(model: SemVAE) -> dict[str, Tensor]:
    """Give the tensors under their published names."""
    state = model.state_dict()
    return {theirs: state[ours] for theirs, ours in published_names(model.config.blocks).items()}
