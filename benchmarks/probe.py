"""Linear classifiers: of features of a published network, as a judge of photographs, and of latents.

A network that is trained on the held-out images alone knows too few of them to tell classes apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from sfd.data.images import ImageSource
from sfd.evaluation.extractors._base import Extraction, Extractor, pretrained
from sfd.evaluation.features import extract
from sfd.evaluation.reference import Reference, reference_of
from sfd.training.tasks.classifier import ClassifierSettings, divide

DECAY = 1e-3  # of the weights, of features of unit variance


class Linear:
    """Logistic regression of features (B, D) on labels (B,) of K classes."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, classes: int) -> None:
        """Fit to features scaled to unit variance."""
        self._mean, self._deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
        inputs, targets = self._inputs(features), torch.from_numpy(np.asarray(labels, np.int64))
        self._weights = torch.zeros(inputs.shape[1], classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([self._weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(inputs @ self._weights, targets) + DECAY * self._weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self._weights.requires_grad_(False)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities (B, K) of features (B, D)."""
        return (self._inputs(features) @ self._weights).softmax(dim=1).numpy()

    def _inputs(self, features: np.ndarray) -> torch.Tensor:
        scaled = torch.from_numpy((features - self._mean) / self._deviation).float()
        return F.pad(scaled, (0, 1), value=1.0)


class Probe:
    """An `Extractor`: a published one's features, with probabilities of the data's classes."""

    name = "probe"

    def __init__(self, network: Extractor, training: ImageSource, reference: ImageSource, cache: Path) -> None:
        """Fit to images that the model was not trained on, and test on others."""
        self.network, self.classes, self.task = network, tuple(training.classes), f"{len(training.classes)} classes"
        seen, unseen = (extract(part, network, "features", cache=cache) for part in (training, reference))
        assert seen is not None and unseen is not None
        self.trained_on, self.identity = len(training), f"{self.name}-{network.identity}-{training.identity}"
        self._linear = Linear(seen.features, np.asarray(training.labels), len(self.classes))
        predicted = self._linear(unseen.features).argmax(axis=1)
        self.accuracy = float((predicted == np.asarray(reference.labels)).mean())

    def extract(self, images: np.ndarray) -> Extraction:
        """Compute features and class probabilities of uint8 images (B, S, S, 3)."""
        features = self.network.extract(images).features
        return Extraction(features=features, probabilities=self._linear(features))


def probed(
    extractor: str, held_out: ImageSource, settings: ClassifierSettings, cache: Path, device: torch.device
) -> Reference:
    """Held-out images as a published extractor sees them, with a probe that is fitted on others of them."""
    training, real = divide(held_out, settings)
    return reference_of(real, Probe(pretrained(extractor, None, device), training, real, cache), "held-out real images")
