"""What every extractor offers, and which published ones there are."""

from __future__ import annotations

import importlib
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sfd.utils.errors import unknown

PUBLISHED = ("inception", "dinov2", "efficientnet_lite")


class Extraction(NamedTuple):
    """What an extractor sees in a batch of images."""

    features: np.ndarray  # (B, D) float32
    probabilities: np.ndarray | None  # (B, classes) float32; None if the extractor knows no classes
    spatial: np.ndarray | None = None  # (B, E) float32, features that keep where things are; None if it has none


class Extractor(Protocol):
    """A frozen network for comparing images; never the encoder that a model was trained with."""

    name: str
    classes: tuple[str, ...]  # that its probabilities are over; () if it knows none, or not by name
    accuracy: float | None  # at its own task, on real images it never saw; None if not known
    trained_on: int | None  # number of images; None: published, or not known
    task: str  # what it was trained to tell ("10 classes", "4 rotations")

    @property
    def identity(self) -> str:
        """Hash that changes whenever a feature would."""

    def extract(self, images: np.ndarray) -> Extraction:
        """Compute what there is to see in images, uint8 (B, S, S, 3)."""
        ...


def pretrained(name: str, weights: str | None, device: torch.device) -> Extractor:
    """Build a published extractor.

    Args:
        name: one of PUBLISHED, each a module of this package with a function `pretrained(weights, device)`.
        weights: a local file or folder, or a name to fetch them by; None: the published ones.
        device: where it computes.
    """
    if name not in PUBLISHED:
        raise unknown("published extractor", name, PUBLISHED)
    built: Extractor = importlib.import_module(f"sfd.evaluation.extractors.{name}").pretrained(weights, device)
    return built
