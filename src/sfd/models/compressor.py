"""Compressors of an encoder's features to a small semantic latent and back: SemVAE and PCA."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from sfd.models import component
from sfd.utils.errors import unknown

KIND = "compressor"
COMPRESSORS = ("semvae", "pca")  # modules of sfd.models


class Compressor(Protocol):
    """Compresses features (B, C, h, w) channel-wise to latents (B, c, h, w). Encoding is deterministic."""

    channels: int  # c

    @property
    def identity(self) -> str:
        """A short hash of configuration and weights."""

    def encode(self, features: Tensor) -> Tensor:
        """Map features (B, C, h, w) to latents (B, c, h, w), keeping no gradient."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents (B, c, h, w) back to features (B, C, h, w), keeping no gradient."""

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`."""

    def to(self, device: Any) -> Any:
        """Move to a device."""


def load_compressor(folder: Path) -> Compressor:
    """Load the compressor in `folder`, in eval mode, without gradients, on the CPU."""
    return cast(Compressor, component.load(folder, (KIND,), _module))


def _module(name: str) -> ModuleType:
    if name not in COMPRESSORS:
        raise unknown(KIND, name, COMPRESSORS)
    return importlib.import_module(f"sfd.models.{name}")
