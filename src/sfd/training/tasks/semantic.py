"""Training of the embedded semantic encoder: class labels, and equal features for differently coloured views."""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sfd.data.images import ImageSource
from sfd.encoders.convnet import ConvNetEncoder
from sfd.training.data import ImageTask
from sfd.training.tasks.augment import DRAWS, recolour
from sfd.utils import rng
from sfd.utils.config import Settings


class SemanticObjective(Settings):
    """The training loss: cross-entropy·CE (of labels, if there are any) + VICReg between the two views.

    VICReg (Bardes et al. 2021, arXiv 2105.04906) on the features at equal positions: invariance·mean (a − b)² +
    variance·hinge(1 − std) + covariance·Σ off-diagonal² / channels.
    """

    cross_entropy: float = Field(3.0, ge=0)
    invariance: float = Field(5.0, ge=0)
    variance: float = Field(5.0, ge=0)
    covariance: float = Field(0.2, ge=0)


class SemanticLearner(nn.Module):
    """A semantic encoder below a linear classifier of its mean features; the classifier is thrown away afterwards."""

    def __init__(self, encoder: ConvNetEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.channels, classes) if classes else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give features (B, C, h, w) and logits (B, classes), or None without classes."""
        features = self.encoder(images)
        return features, None if self.classifier is None else self.classifier(features.mean((2, 3)))


class SemanticTask(ImageTask):
    """Train a semantic encoder on images and recoloured copies of them: equal features at equal places, and labels."""

    name = "semantic encoder"
    Objective = SemanticObjective

    def __init__(self, encoder: ConvNetEncoder, source: ImageSource, objective: SemanticObjective, **how: int) -> None:
        """See `ImageTask`."""
        with rng.seeded(how["seed"], "classifier of the semantic encoder"):
            learner = SemanticLearner(encoder, len(source.classes))
        super().__init__(learner, source, objective, **how)

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give images, labels and the numbers by which the second view is recoloured."""
        return super().batch(step, samples) | {"draws": self.uniform("recolour", step, samples, DRAWS)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the objective; `accuracy` is also logged if there are labels."""
        images, labels, weights = batch["images"], batch["labels"], self.objective
        # The first view is the image itself, so that the encoder has seen what it will be given.
        features, logits = model(torch.cat([images, recolour(images, batch["draws"])]))
        invariance, variance, covariance = vicreg(*features.float().chunk(2))
        loss = weights.invariance * invariance + weights.variance * variance + weights.covariance * covariance
        record = {"invariance": invariance, "variance": variance, "covariance": covariance}
        if logits is not None:
            labels = labels.repeat(2)
            cross_entropy = F.cross_entropy(logits.float(), labels)
            loss = loss + weights.cross_entropy * cross_entropy
            record |= {"cross_entropy": cross_entropy, "accuracy": (logits.argmax(1) == labels).float().mean()}
        return {"loss": loss, **record}

    def finish(self, model: nn.Module) -> ConvNetEncoder:
        """Take the encoder out of what `fit` returned."""
        return cast(SemanticLearner, model).encoder


def vicreg(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute VICReg's invariance, variance and covariance terms between features (B, C, h, w) at equal positions.

    Bardes et al. 2021 (arXiv 2105.04906), equations 1 to 5, with every position of every image one sample. The mean
    over the batch is taken position by position, so that features that only tell the position count as constant.
    """
    channels = first.shape[1]
    invariance = (first - second).square().mean()
    variance, covariance = first.new_zeros(()), first.new_zeros(())
    # In float32 whatever the network ran in: the terms are small differences.
    with torch.autocast(first.device.type, enabled=False):
        for view in (first, second):
            samples = (view - view.mean(0)).movedim(1, -1).flatten(0, 2)  # (B·h·w, C)
            matrix = samples.T @ samples / max(len(samples) - 1, 1)
            spread = (matrix.diagonal() + 1e-4).sqrt()
            variance = variance + F.relu(1 - spread).mean() / 2
            covariance = covariance + (matrix.square().sum() - matrix.diagonal().square().sum()) / channels / 2
    return invariance, variance, covariance
