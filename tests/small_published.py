"""Small models of the published classes, saved as their libraries save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfd import randomness

KL: dict[str, Any] = {
    "latent_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
}


def save_kl(folder: Path, **changes: Any):
    """Save an `AutoencoderKL` that shrinks images by 2, and give it."""
    from diffusers import AutoencoderKL

    with randomness.seeded(0, "kl"):
        model = AutoencoderKL(**{**KL, **changes}).eval()
    model.save_pretrained(folder)
    return model
