"""Training of the evaluation classifier on a part of the held-out images; the rest is the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sfd.data.images import ImageSource, to_tensor
from sfd.data.split import split
from sfd.models.classifier import CHUNK, NETWORK, ROTATIONS, Classifier, ClassifierConfig
from sfd.models.convnet import ConvNetConfig
from sfd.training.config import TrainSettings
from sfd.training.data import ImageTask
from sfd.training.trainer import fit
from sfd.utils import rng
from sfd.utils.config import Settings

CALIBRATION = 2048  # real images, at most, over which the features' deviations are measured


class ClassifierSettings(Settings):
    """Settings of the evaluation classifier."""

    network: ConvNetConfig = NETWORK
    training: TrainSettings = TrainSettings(
        steps=400, batch_size=128, learning_rate=2e-3, weight_decay=0.05, warmup=50, decay="cosine"
    )
    reference: float = Field(0.4, gt=0, lt=1, description="share of held-out images kept to test and to compare with")
    shift: int = Field(2, ge=0, description="largest random shift in training, pixels")
    flip: bool = Field(True, description="mirror half of the training images")
    seed: int = Field(0, ge=0)


class ClassifierTask(ImageTask):
    """Trains a classifier, on classes or on rotations."""

    name = "evaluation classifier"

    def __init__(self, source: ImageSource, settings: ClassifierSettings) -> None:
        self.settings = settings
        config = ClassifierConfig(image_size=source.image_size, classes=tuple(source.classes), network=settings.network)
        with rng.seeded(settings.seed, "evaluation classifier"):
            classifier = Classifier(config)
        super().__init__(classifier, source, None, seed=settings.seed, batch_size=settings.training.batch_size)

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Load some samples of a step, augmented."""
        indices = self.order.indices(step, samples, self.batch_size)
        images, labels = self.source.load(indices), self.source.labels[indices]
        generators = [rng.generator(self.seed, "augmentation", step, slot) for slot in samples]
        seen = augment(images, generators, self.settings.shift, self.settings.flip)
        if not self.source.classes:
            labels = np.array([g.integers(ROTATIONS) for g in generators])
            seen = np.stack([np.rot90(image, turns) for image, turns in zip(seen, labels, strict=True)])
        return {"images": to_tensor(seen), "labels": torch.from_numpy(labels), "indices": torch.from_numpy(indices)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy, lightly smoothed, and the accuracy on the batch."""
        _, logits = model(batch["images"])
        loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=0.05)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == batch["labels"]).float().mean()}


def augment(images: np.ndarray, generators: Sequence[np.random.Generator], shift: int, flip: bool) -> np.ndarray:
    """Shift each uint8 image of (B, S, S, 3) by up to `shift` pixels, edges reflected, and mirror half of them."""
    size, result = images.shape[1], np.empty_like(images)
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    for row, generator in enumerate(generators):
        top, left, mirror = (*generator.integers(2 * shift + 1, size=2), generator.integers(2))
        moved = padded[row, top : top + size, left : left + size]
        result[row] = moved[:, ::-1] if flip and mirror else moved
    return result


def divide(held_out: ImageSource, settings: ClassifierSettings) -> tuple[ImageSource, ImageSource]:
    """Split the held-out images: a part trains the classifier, the other tests it and is the reference."""
    return split(held_out, settings.reference, settings.seed)


def train_classifier(
    held_out: ImageSource, settings: ClassifierSettings, folder: Path, *, device: torch.device
) -> Classifier:
    """Train the classifier, or resume; calibrate it; test it on unseen images.

    Args:
        held_out: real images that the generative model is not trained on.
        settings: how.
        folder: where checkpoints and the log go.
        device: where to train.
    """
    training, reference = divide(held_out, settings)
    model = cast(Classifier, fit(ClassifierTask(training, settings), settings.training, folder, device=device))
    model.calibrate(to_tensor(training.load(np.arange(min(len(training), CALIBRATION)))))
    found = {"trained_on": len(training), "accuracy": accuracy(model, reference)}
    model.config = model.config.model_copy(update=found)
    return model


def accuracy(model: Classifier, source: ImageSource) -> float:
    """Accuracy of a classifier on images (or on all four rotations of each)."""
    labels, right = np.asarray(source.labels), 0
    turns = (0,) if model.config.classes else range(ROTATIONS)
    for start in range(0, len(source), CHUNK):
        indices = np.arange(start, min(start + CHUNK, len(source)))
        images = source.load(indices)
        for turn in turns:
            _, logits = model.predict(to_tensor(np.rot90(images, turn, axes=(1, 2)).copy()))
            truth = labels[indices] if model.config.classes else turn
            right += int((logits.argmax(dim=1).numpy() == truth).sum())
    return right / (len(source) * len(turns))
