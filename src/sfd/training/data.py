"""Training batches: the order of the data, batches of images, and threads that prepare them ahead of time.

Order and random draws are functions of (seed, step, sample), so that a run can stop anywhere and resume exactly, with
any number of ranks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfd.data.images import ImageSource, to_tensor
from sfd.training.config import TrainSettings
from sfd.utils import distributed, rng
from sfd.utils.errors import SFDError
from sfd.utils.threads import ahead

Batch = dict[str, Tensor]
MAX_WORKERS = 8  # unless configured: each holds a batch in memory


class EpochOrder:
    """A new permutation of the data every epoch."""

    def __init__(self, seed: int, length: int) -> None:
        if length < 1:
            raise SFDError("there is nothing to train on: the data set is empty")
        self.seed, self.length = seed, length
        self._permutation = lru_cache(2)(self._permute)  # a batch may reach from one epoch into the next

    def indices(self, step: int, samples: range, batch_size: int) -> np.ndarray:
        """Give the data indices of some samples of a step's global batch.

        Args:
            step: from 0.
            samples: positions within the global batch, each in [0, batch_size).
            batch_size: of the global batch.
        """
        epochs, positions = np.divmod(step * batch_size + np.asarray(samples, dtype=np.int64), self.length)
        chosen = np.empty(len(samples), dtype=np.int64)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            chosen[mask] = self._permutation(int(epoch))[positions[mask]]
        return chosen

    def _permute(self, epoch: int) -> np.ndarray:
        return rng.generator(self.seed, "order", epoch).permutation(self.length)


class ImageTask:
    """A training task on batches of images, flipped at random.

    Args:
        model: the network to train.
        source: images to train on; each is seen in both orientations.
        objective: weights of the loss.
        seed: of the order, the flips and all other draws.
        batch_size: of the global batch.
    """

    def __init__(self, model: nn.Module, source: ImageSource, objective: Any, *, seed: int, batch_size: int) -> None:
        self.model, self.source, self.objective = model, source, objective
        self.seed, self.batch_size = seed, batch_size
        self.order = EpochOrder(seed, len(source))

    def batch(self, step: int, samples: range) -> Batch:
        """Give images (B, 3, H, W) in [-1, 1], labels (B,) and indices in the data set (B,)."""
        indices = self.order.indices(step, samples, self.batch_size)
        images = to_tensor(self.source.load(indices))
        flip = self.uniform("flip", step, samples, 1) < 0.5
        images = torch.where(flip[:, :, None, None], images.flip(3), images)
        labels = torch.from_numpy(self.source.labels[indices])
        return {"images": images, "labels": labels, "indices": torch.from_numpy(indices)}

    def finish(self, model: nn.Module) -> Any:
        """Take the component that was trained out of what `fit` returned."""
        return model

    def uniform(self, purpose: str, step: int, samples: range, size: int) -> Tensor:
        """Draw (B, size) uniform numbers, each row from (seed, purpose, step, sample) alone."""
        generators = rng.generators(self.seed, purpose, step, samples=samples)
        return torch.from_numpy(np.stack([g.random(size, dtype=np.float32) for g in generators]))

    def normal(self, purpose: str, step: int, samples: range, shape: tuple[int, ...]) -> Tensor:
        """Draw (B, *shape) standard normal numbers, as `uniform` does."""
        generators = rng.generators(self.seed, purpose, step, samples=samples)
        return torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))


def micro_batches(settings: TrainSettings) -> int:
    """Number of micro-batches of a step, over all ranks."""
    return distributed.world_size() * settings.accumulate


def sample_range(settings: TrainSettings, micro: int) -> range:
    """Give the positions in the global batch of one of this rank's `accumulate` micro-batches."""
    size = settings.batch_size // micro_batches(settings)
    start = (micro * distributed.world_size() + distributed.rank()) * size
    return range(start, start + size)


def num_workers(settings: TrainSettings, device: torch.device) -> int:
    """Give the number of threads that prepare batches; where the CPU trains, its cores are busy and one is best."""
    if settings.workers is not None:
        return settings.workers
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, max(1, cores // distributed.local_world_size() - 1))


class Prefetcher:
    """This rank's micro-batches in order, prepared by threads while earlier ones are in use."""

    def __init__(
        self, make: Callable[[int, range], Batch], settings: TrainSettings, *, threads: int = 1, pinned: bool = False
    ) -> None:
        """Prepare nothing yet.

        Args:
            make: gives samples of a step's global batch; several threads call it at once.
            settings: number of steps, batch size, accumulation, data offset.
            threads: number of batches that are prepared at once.
            pinned: put batches into memory that a GPU copies from asynchronously.
        """
        self._make, self._settings, self._threads, self._pinned = make, settings, threads, pinned
        self._batches = ahead(self._prepare, (), 1)
        self._waited, self._since = 0.0, time.monotonic()

    def start(self, step: int) -> None:
        """Begin with the batches of a step."""
        settings = self._settings
        keys = (
            (s + settings.data_offset, sample_range(settings, micro))
            for s in range(step, settings.steps)
            for micro in range(settings.accumulate)
        )
        alone = partial(_run_serially, torch.get_num_threads()) if self._threads > 1 else None
        self._batches = ahead(self._prepare, keys, self._threads, alone)

    def next(self) -> Batch:
        """Give the next micro-batch, while others are prepared."""
        start = time.monotonic()
        batch = next(self._batches)
        self._waited += time.monotonic() - start
        return batch

    def waiting(self) -> float:
        """Give the fraction of the time since the last call that training waited for batches."""
        now = time.monotonic()
        fraction = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return fraction

    def close(self) -> None:
        """Stop preparing."""
        self._batches.close()

    def _prepare(self, key: tuple[int, range]) -> Batch:
        batch = self._make(*key)
        return {name: value.pin_memory() for name, value in batch.items()} if self._pinned else batch


def _run_serially(other_threads: int) -> None:
    """Run PyTorch's operations of this thread in this thread alone; otherwise every worker would use all cores.

    Args:
        other_threads: number of threads that operations of other threads use, and keep using.
    """
    torch.get_num_threads()  # a thread takes over the global number when it first asks
    torch.set_num_threads(1)  # sets this thread's number and the global one
    restore = threading.Thread(target=torch.set_num_threads, args=(other_threads,))
    restore.start()
    restore.join()
