"""Latent shards in the published format: what is read from them, normalised, and their statistics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfd.data.published import open_published
from sfd.data.shards import FEATURES
from sfd.verification._case import Case


def claims(folder: Path, name: str, values: Mapping[str, Any]) -> bool:
    """Whether it is a folder of shards that has something to be compared with."""
    return (folder / name).is_dir() and (folder / f"{name}.expected.safetensors").exists()


def check(case: Case) -> None:
    """Read all images in both orientations, the labels and the statistics."""
    latents = open_published(case.folder / case.name)
    composite = latents.composite({}, {})
    everything = np.arange(len(latents))
    ours: dict[str, Tensor] = {"labels": latents.labels}
    for suffix, flip in (("plain", False), ("flip", True)):
        flips = np.full(len(latents), flip)
        normal = composite.normalize({name: latents.read(name, everything, flips) for name in composite.names})
        ours[f"composite_{suffix}"] = composite.per_position(composite.pack(normal))
        if latents.manifest.features is not None:
            ours[f"features_{suffix}"] = latents.read(FEATURES, everything, flips)
    for stream in composite.streams:
        ours |= {f"{stream.name}_mean": torch.tensor(stream.mean), f"{stream.name}_std": torch.tensor(stream.std)}
    expected = case.references("expected")
    for quantity, value in ours.items():
        case.compare_if_there(quantity, value, expected)
    case.unchecked += expected.never_asked()
