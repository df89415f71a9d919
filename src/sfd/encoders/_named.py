"""Saved semantic encoders: most with their weights, large published ones by name.

A named encoder is a `config.json` without weights: the published model's name, the encoder's configuration and its
identity, which is checked when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfd.encoders._base import NAMED, SEMANTIC, SemanticEncoder, load_encoder, load_named, planned_encoder
from sfd.models.component import CONFIG_FILE, Component
from sfd.utils import files

LARGE = 16 * 2**20  # parameters; larger published encoders are named


class NamedEncoder:
    """A published semantic encoder, loaded by its first `encode` or `to`."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about, self.identity = folder, about, str(about["identity"])
        config = planned_encoder(about["name"], None, str(folder), {})
        self.channels, self.downsample = config.channels, config.downsample
        self._loaded: Component | None = None

    def encode(self, images: Tensor) -> Tensor:
        """Load the encoder and encode; see `SemanticEncoder`."""
        return cast(Tensor, self.to(images.device).encode(images))

    def to(self, device: Any) -> Any:
        """Give the encoder itself, on a device."""
        self._loaded = self._loaded or load_named(self.folder, self.about)
        return self._loaded.to(device)


def load_semantic(folder: Path) -> SemanticEncoder:
    """Load the semantic encoder in `folder`, as `load_encoder` does; one that is named is loaded when it is used."""
    about = files.read_json(folder / CONFIG_FILE, SEMANTIC)
    if NAMED in about:
        return NamedEncoder(folder, about)
    return cast(SemanticEncoder, load_encoder(folder, SEMANTIC))


def save_semantic(encoder: SemanticEncoder, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save an encoder to `folder`, weights as `dtype`; a large published one by its name and identity."""
    if isinstance(encoder, NamedEncoder):
        files.write_json(folder / CONFIG_FILE, encoder.about)
        return
    part = cast(Component, encoder)
    if part.source and sum(tensor.numel() for tensor in part.state_dict().values()) > LARGE:
        about = {"kind": SEMANTIC, "name": part.name, "identity": part.identity, NAMED: part.source}
        files.write_json(folder / CONFIG_FILE, about | {"config": part.config.model_dump(mode="json")})
    else:
        part.save(folder, dtype)
