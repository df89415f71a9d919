"""What every extractor offers, and how one is found again from its directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sfd import files, registry
from sfd.errors import SFDError

PACKAGE = "sfd.evaluation.extractors"
FORMAT = 1


class Extraction(NamedTuple):
    """What an extractor sees in a batch of images."""

    features: np.ndarray  # (B, D) float32
    probabilities: np.ndarray | None  # (B, len(classes)) float32; None if the extractor knows no classes


class Extractor(Protocol):
    """A frozen network for comparing images; never the encoder that a model was trained with.

    A module of this package offers one, with `save(folder)` and a module function `load(folder, device)`.
    """

    name: str  # the module's name
    identity: str  # changes whenever a feature would
    image_size: int  # rows and columns of the images it takes
    classes: tuple[str, ...]  # that its probabilities are over; () if it knows none
    accuracy: float | None  # at its own task, on real images it never saw; None if not known
    task: str  # what that task is ("10 classes", "4 rotations")

    def extract(self, images: np.ndarray) -> Extraction:
        """Look at images, uint8 (B, image_size, image_size, 3)."""
        ...


def save(folder: Path, name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an extractor's directory: `extractor.json` and `weights.safetensors`."""
    with files.written(folder) as partial:
        files.write_tensors(partial / "weights.safetensors", tensors)
        files.write_json(partial / "extractor.json", {"format": FORMAT, "extractor": name, **record})


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save` wrote: the record and the tensors."""
    record = files.read_json(folder / "extractor.json", "extractor directory")
    if record.get("format") != FORMAT:
        raise SFDError(
            f"{folder} holds an extractor of format {record.get('format')!r}, this program reads format {FORMAT}; "
            "train it again"
        )
    return record, files.read_tensors(folder / "weights.safetensors")


def load_extractor(folder: Path, device: torch.device) -> Extractor:
    """Load whichever extractor a directory holds.

    Raises:
        SFDError: the directory holds none, is damaged, or names an extractor that does not exist.
    """
    record, _ = read(folder)
    module = registry.find(PACKAGE, str(record.get("extractor")), "extractor")
    loaded: Extractor = module.load(folder, device)
    return loaded


def identity(name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash a network's configuration and weights into a short stable name."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return f"{name}-{digest.hexdigest()[:16]}"
