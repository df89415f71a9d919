"""The embedded extractor: a classifier trained on real images that the generative model never sees."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch

from sfd.data.images import ImageSource, to_tensor
from sfd.evaluation.extractors._base import Extraction
from sfd.models import component
from sfd.models.classifier import ROTATIONS, Classifier
from sfd.training.tasks.classifier import ClassifierSettings
from sfd.utils.device import full_float32
from sfd.utils.errors import SFDError


class ClassifierExtractor:
    """A trained classifier as an `Extractor`."""

    name = "classifier"

    def __init__(self, network: Classifier) -> None:
        self.network = network
        self.image_size, self.classes = network.config.image_size, network.config.classes
        self.accuracy, self.trained_on = network.config.accuracy, network.config.trained_on
        self.task = f"{len(self.classes)} classes" if self.classes else f"{ROTATIONS} rotations"

    @property
    def identity(self) -> str:
        """Hash of configuration and weights."""
        return f"{self.name}-{self.network.identity}"

    @full_float32()
    def extract(self, images: np.ndarray) -> Extraction:
        """Compute features and class probabilities of uint8 images (B, S, S, 3)."""
        if images.shape[1] != self.image_size:
            raise SFDError(
                f"the run's classifier takes images of {self.image_size}×{self.image_size} pixels, but these have "
                f"{images.shape[2]}×{images.shape[1]}; give --image-size {self.image_size} to scale and crop them"
            )
        features, logits = self.network.predict(to_tensor(images))
        return Extraction(features.numpy(), logits.softmax(dim=1).numpy() if self.classes else None)


def load_classifier(folder: Path, device: torch.device) -> ClassifierExtractor:
    """Read a saved `Classifier`."""
    network = component.load(folder, (Classifier.kind,), "sfd.models")
    return ClassifierExtractor(cast(Classifier, network.to(device)))


def check_data(held_out: ImageSource, settings: ClassifierSettings) -> None:
    """Verify, before hours of work, that the held-out images will do for the classifier and as the reference."""
    size, side = held_out.image_size, settings.network.downsample
    if size % side:
        fitting = " or ".join(str(s) for s in (size // side * side, size // side * side + side) if s)
        raise SFDError(
            f"the evaluation classifier needs images whose side is a multiple of {side}, but data.image_size is "
            f"{size}; set it to {fitting}, or give evaluation.classifier.network fewer widths or a smaller stem_stride"
        )
    counts = np.bincount(held_out.labels, minlength=max(1, len(held_out.classes)))
    scarce = [held_out.classes[i] if held_out.classes else "the data set" for i in np.flatnonzero(counts < 2)]
    if scarce:
        raise SFDError(
            f"{', '.join(scarce)}: fewer than 2 held-out images, but the evaluation needs one to train its classifier "
            "and one to compare with; raise data.holdout, or give each class at least 2 / data.holdout images"
        )
