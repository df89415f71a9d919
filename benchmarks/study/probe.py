"""A judge of photographs: a linear classifier of the features of a published network.

A network that is trained on the held-out images alone knows too few of them to tell classes apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from sfd.data.images import ImageSource
from sfd.evaluation.extractors._base import Extraction, Extractor
from sfd.evaluation.features import extract

DECAY = 1e-3  # of the weights, of features of unit variance


class Probe:
    """An `Extractor`: a published one's features, with probabilities of the data's classes."""

    name = "probe"

    def __init__(self, network: Extractor, training: ImageSource, reference: ImageSource, cache: Path) -> None:
        """Fit to images that the model was not trained on, and test on others."""
        self.network, self.classes, self.task = network, tuple(training.classes), f"{len(training.classes)} classes"
        seen, unseen = (extract(part, network, "features", cache=cache) for part in (training, reference))
        assert seen is not None and unseen is not None
        self.trained_on, self.identity = len(training), f"{self.name}-{network.identity}-{training.identity}"
        self._mean, self._deviation = seen.features.mean(axis=0), seen.features.std(axis=0) + 1e-6
        self._weights = self._fit(seen.features, np.asarray(training.labels))
        predicted = self._probabilities(unseen.features).argmax(axis=1)
        self.accuracy = float((predicted == np.asarray(reference.labels)).mean())

    def extract(self, images: np.ndarray) -> Extraction:
        """Compute features and class probabilities of uint8 images (B, S, S, 3)."""
        features = self.network.extract(images).features
        return Extraction(features=features, probabilities=self._probabilities(features))

    def _inputs(self, features: np.ndarray) -> torch.Tensor:
        scaled = torch.from_numpy((features - self._mean) / self._deviation).float()
        return F.pad(scaled, (0, 1), value=1.0)

    def _fit(self, features: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        inputs, targets = self._inputs(features), torch.from_numpy(labels)
        weights = torch.zeros(inputs.shape[1], len(self.classes), requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(inputs @ weights, targets) + DECAY * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weights.detach()

    def _probabilities(self, features: np.ndarray) -> np.ndarray:
        return (self._inputs(features) @ self._weights).softmax(dim=1).numpy()
