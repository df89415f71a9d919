"""What turns an encoder's features into a small semantic latent and back: SemVAE, or PCA."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from sfd.models import component
from sfd.models.component import Component
from sfd.utils.config import parse
from sfd.utils.errors import unknown

KIND = "compressor"
# Name in config.json to module and the name of its configuration record.
COMPRESSORS = {"semvae": ("sfd.models.semvae", "SemVAEConfig"), "pca": ("sfd.models.pca", "PCAConfig")}


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
    """Load the compressor in `folder`, in eval mode, without gradients, on the CPU.

    Raises:
        SFDError: the folder holds no compressor, one that this version does not know, or damaged weights.
    """
    saved = component.read(folder, (KIND,))
    if saved.name not in COMPRESSORS:
        raise unknown(KIND, saved.name, COMPRESSORS)
    module_name, config_name = COMPRESSORS[saved.name]
    module = importlib.import_module(module_name)
    config = parse(getattr(module, config_name), saved.config, str(folder / component.CONFIG_FILE))
    component.check_fit(lambda: module.build(config), saved.tensors, str(folder))
    part = cast(Component, module.build(config))
    part.fill(saved)
    return cast(Compressor, part.eval().requires_grad_(False))
