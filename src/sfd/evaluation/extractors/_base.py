"""What every extractor offers, and how one is found again from its directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sfd.utils import files, registry
from sfd.utils.errors import SFDError

PACKAGE = "sfd.evaluation.extractors"
FORMAT = 1


class Extraction(NamedTuple):
    """What an extractor sees in a batch of images."""

    features: np.ndarray  # (B, D) float32
    probabilities: np.ndarray | None  # (B, classes) float32; None if the extractor knows no classes
    spatial: np.ndarray | None = None  # (B, E) float32, features that keep where things are; None if it has none


class Extractor(Protocol):
    """A frozen network for comparing images; never the encoder that a model was trained with.

    A module of this package offers one. If a run trains it, the module has `load(folder, device)` and the extractor
    `save(folder)`; if it is published, the module has `pretrained(weights, device)`, where `weights` is a local file or
    folder or what the extractor fetches by name, and None stands for the published weights.
    """

    name: str  # the module's name
    identity: str  # changes whenever a feature would
    classes: tuple[str, ...]  # that its probabilities are over; () if it knows none, or not by name
    accuracy: float | None  # at its own task, on real images it never saw; None if not known
    task: str  # what that task is ("10 classes", "4 rotations")

    def extract(self, images: np.ndarray) -> Extraction:
        """Look at images, uint8 (B, S, S, 3).

        Raises:
            SFDError: S is not a size that it takes.
        """
        ...


def whole_float32() -> AbstractContextManager[None]:
    """Compute convolutions in float32 throughout: on GPUs, PyTorch would by default round their factors to 10 bits."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def save(folder: Path, name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an extractor's directory: `extractor.json` and `weights.safetensors`."""
    with files.atomic_write(folder) as partial:
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
    name = str(record.get("extractor"))
    module = registry.find(PACKAGE, name, "extractor")
    if not hasattr(module, "load"):
        raise SFDError(f"{folder} names the extractor {name!r}, which no run trains; make the folder again")
    loaded: Extractor = module.load(folder, device)
    return loaded


def pretrained(name: str, weights: str | None, device: torch.device) -> Extractor:
    """Build a published extractor.

    Args:
        name: its module.
        weights: a local file or folder, or a name to fetch them by; None: the published ones.
        device: where it computes.

    Raises:
        SFDError: there is none of that name, a package that it needs is missing, or the weights are not its own.
    """
    module = registry.find(PACKAGE, name, "extractor")
    if not hasattr(module, "pretrained"):
        raise SFDError(f"the extractor {name!r} is trained by a run; give --run RUN in place of --reference")
    built: Extractor = module.pretrained(weights, device)
    return built


def identity(name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash a network's configuration and weights into a short stable name."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return f"{name}-{digest.hexdigest()[:16]}"
