"""Compressors of an encoder's features to a small semantic latent and back: SemVAE and PCA."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor

from sfd.models import component
from sfd.models.component import Component
from sfd.utils.errors import SFDError

KIND = "compressor"


class Compressor(Component):
    """Compresses features (B, C, h, w) channel-wise to latents (B, c, h, w). Encoding is deterministic."""

    kind = KIND
    channels: int  # c

    def encode(self, features: Tensor) -> Tensor:
        """Map features (B, C, h, w) to latents (B, c, h, w), keeping no gradient."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents (B, c, h, w) back to features (B, C, h, w), keeping no gradient."""
        raise NotImplementedError


def check_channels(given: int, expected: int) -> None:
    """Refuse features of another encoder, which have another number of channels."""
    if given != expected:
        raise SFDError(f"this takes features of {expected} channels, got {given}; use its encoder")


def load_compressor(folder: Path) -> Compressor:
    """Load the compressor in `folder`, in eval mode, without gradients, on the CPU."""
    return cast(Compressor, component.load(folder, (KIND,), "sfd.models"))
