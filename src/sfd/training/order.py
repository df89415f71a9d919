"""The order in which training sees its data, as a function of the seed and the step alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sfd.utils import rng
from sfd.utils.errors import SFDError


class EpochOrder:
    """A new permutation every epoch; slot i of step s holds number s·batch_size + i of the endless sequence."""

    def __init__(self, seed: int, length: int) -> None:
        if length < 1:
            raise SFDError("there is nothing to train on: the data set is empty")
        self.seed, self.length = seed, length
        self._permutation = lru_cache(2)(self._permute)  # a batch may reach from one epoch into the next

    def indices(self, step: int, samples: range, batch_size: int) -> np.ndarray:
        """Give the data indices of some slots of a step's global batch.

        Args:
            step: from 0.
            samples: slots within the global batch, each in [0, batch_size).
            batch_size: of the global batch.
        """
        epochs, places = np.divmod(step * batch_size + np.asarray(samples, dtype=np.int64), self.length)
        chosen = np.empty(len(samples), dtype=np.int64)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            chosen[mask] = self._permutation(int(epoch))[places[mask]]
        return chosen

    def _permute(self, epoch: int) -> np.ndarray:
        return rng.generator(self.seed, "order", epoch).permutation(self.length)
