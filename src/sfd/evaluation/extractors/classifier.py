"""The embedded extractor: a classifier trained on real images that the generative model never sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sfd.data.images import ImageSource, to_tensor
from sfd.evaluation.evaluate import NEIGHBOURS
from sfd.evaluation.extractors import _base
from sfd.evaluation.extractors._base import Extraction
from sfd.models.classifier import ROTATIONS, Classifier, ClassifierConfig
from sfd.training.tasks.classifier import ClassifierSettings, divide
from sfd.utils.config import parse
from sfd.utils.errors import SFDError


class ClassifierExtractor:
    """A trained classifier as an `Extractor`."""

    name = "classifier"

    def __init__(self, network: Classifier) -> None:
        self.network, self.config, self.accuracy = network, network.config, network.accuracy
        self.classes = network.config.classes
        self.task = f"{len(self.classes)} classes" if self.classes else f"{ROTATIONS} rotations"

    @property
    def identity(self) -> str:
        """Hash of configuration and weights."""
        return _base.identity(self.name, self.config.model_dump(mode="json"), self.network.state_dict())

    def extract(self, images: np.ndarray) -> Extraction:
        """Compute features and class probabilities of uint8 images (B, S, S, 3)."""
        expected = (self.config.image_size, self.config.image_size, 3)
        if images.shape[1:] != expected:
            raise SFDError(
                f"the extractor takes images of shape {expected}, got {images.shape[1:]}; "
                "evaluate with an extractor trained at the samples' size"
            )
        features, logits = self.network.predict(to_tensor(images))
        return Extraction(features.numpy(), logits.softmax(dim=1).numpy() if self.classes else None)

    def save(self, folder: Path) -> None:
        """Write the directory that `load` reads."""
        record = {"config": self.config.model_dump(mode="json"), "accuracy": self.accuracy}
        _base.save(folder, self.name, record, self.network.state_dict())


def load(folder: Path, device: torch.device) -> ClassifierExtractor:
    """Read a classifier's directory."""
    record, tensors = _base.read(folder)
    network = Classifier(parse(ClassifierConfig, record.get("config", {}), str(folder / "extractor.json")))
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise SFDError(f"{folder}: the weights do not fit extractor.json; train the extractor again") from None
    network.accuracy = record.get("accuracy")
    return ClassifierExtractor(network.eval().to(device))


def check_data(held_out: ImageSource, settings: ClassifierSettings) -> None:
    """Verify, before hours of work, that the held-out images will do for the classifier and as the reference.

    Raises:
        SFDError: their size does not fit the network, a class has too few of them to be cut in two, or too few would
            be left as the reference.
    """
    size, side = held_out.image_size, settings.network.downsample
    if size % side:
        fitting = " or ".join(str(s) for s in (size // side * side, size // side * side + side) if s)
        raise SFDError(
            f"the evaluation classifier needs images whose side is a multiple of {side}, but data.image_size is "
            f"{size}; set it to {fitting}, or give evaluation.classifier.network fewer widths or a smaller stem_stride"
        )
    counts = np.bincount(held_out.labels, minlength=max(1, len(held_out.classes)))
    if counts.min() < 2:
        scarce = int(counts.argmin())
        what = f"class {held_out.classes[scarce]!r}" if held_out.classes else "the data set"
        raise SFDError(
            f"{what} has {counts[scarce]} held-out image{'' if counts[scarce] == 1 else 's'}, but the evaluation "
            "needs 2, one to learn from and one to compare with; raise data.holdout, or give it at least "
            "2 / data.holdout images in all"
        )
    count = len(divide(held_out, settings)[1])
    if count <= NEIGHBOURS:
        raise SFDError(
            f"of {len(held_out)} held-out images {count} would be the reference, but precision and recall need at "
            f"least {NEIGHBOURS + 1}; add images, or raise data.holdout or evaluation.classifier.reference"
        )
