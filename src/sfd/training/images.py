"""Training batches that are images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sfd.data.images import ImageSource, to_tensor
from sfd.training.order import EpochOrder
from sfd.utils import rng


class ImageBatches:
    """Batches of images, flipped at random: a function of the seed, the step and the sample's slot alone."""

    def __init__(self, source: ImageSource, seed: int, batch_size: int) -> None:
        self.source, self.seed, self.batch_size = source, seed, batch_size
        self.order = EpochOrder(seed, len(source))

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give images (B, 3, H, W) in [-1, 1], labels (B,), and their numbers in the data set, `indices` (B,)."""
        indices = self.order.indices(step, samples, self.batch_size)
        images = to_tensor(self.source.load(indices))
        flip = self.uniform("flip", step, samples, 1) < 0.5
        images = torch.where(flip[:, :, None, None], images.flip(3), images)
        labels = torch.from_numpy(self.source.labels[indices])
        return {"images": images, "labels": labels, "indices": torch.from_numpy(indices)}

    def uniform(self, purpose: str, step: int, samples: range, size: int) -> Tensor:
        """Draw (len(samples), size) uniform numbers. A slot's numbers do not depend on which others are asked for."""
        draws = rng.generator(self.seed, purpose, step).random((samples.stop, size), dtype=np.float32)
        return torch.from_numpy(draws[samples.start :])

    def normal(self, purpose: str, step: int, samples: range, shape: tuple[int, ...]) -> Tensor:
        """Draw (len(samples), *shape) standard normal numbers, as `uniform` does."""
        draws = rng.generator(self.seed, purpose, step).standard_normal((samples.stop, *shape), dtype=np.float32)
        return torch.from_numpy(draws[samples.start :])
