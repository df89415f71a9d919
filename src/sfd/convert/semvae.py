"""Published SemVAE checkpoints: their tensors have the same names here; the configuration is read from their shapes."""

from __future__ import annotations

from collections.abc import Mapping

from sfd.models.semvae import SemVAEConfig
from sfd.utils.config import explain
from sfd.utils.errors import SFDError


def inferred_config(shapes: Mapping[str, tuple[int, ...]], heads: int = 6) -> SemVAEConfig:
    """Read the configuration from the shapes of a published checkpoint's tensors.

    Args:
        shapes: by name.
        heads: attention heads, which shapes do not determine.
    """
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("encoder.")}) - 3
    first, last = shapes.get("encoder.0.weight"), shapes.get(f"encoder.{blocks + 2}.weight")
    if blocks < 1 or first is None or last is None:
        raise SFDError(
            "this is not a published SemVAE checkpoint: it needs tensors encoder.0.weight, encoder.1.norm1.weight, … "
            f"and has {', '.join(sorted(shapes)[:3]) or 'none'}; give the file's state dictionary"
        )
    try:
        return SemVAEConfig(
            input_channels=first[1], latent_channels=last[0] // 2, width=first[0], heads=heads, blocks=blocks
        )
    except (ValueError, IndexError) as error:
        raise explain(error, SemVAEConfig, "shapes of the published SemVAE") from None
