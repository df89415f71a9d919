"""Equality of folders and of sets of tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without the times that stages record."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "stage.json"}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
