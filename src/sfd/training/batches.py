"""Batches, each prepared by a thread while the one before it is being used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from sfd import processes
from sfd.training.settings import TrainSettings

Batch = dict[str, Tensor]

# After a rollback training draws its batches from so many steps further on: another order, other noise.
ATTEMPT_STEPS = 1 << 32


def parts(settings: TrainSettings) -> int:
    """The number of equal parts that a step's global batch is divided into."""
    return processes.count() * settings.accumulate


def slots(settings: TrainSettings, part: int) -> range:
    """Give this process's slots of the global batch in one of a step's `accumulate` backward passes."""
    size = settings.batch_size // parts(settings)
    start = (part * processes.count() + processes.rank()) * size
    return range(start, start + size)


def drawn_step(step: int, attempt: int) -> int:
    """Give the step that a batch is asked for by: in attempt 0 the step itself."""
    return step + attempt * ATTEMPT_STEPS


class Batches:
    """This process's batches in order, from any step and attempt on."""

    def __init__(self, make: Callable[[int, range], Batch], settings: TrainSettings, *, pinned: bool = False) -> None:
        """Prepare nothing yet.

        Args:
            make: gives the slots of a step's global batch.
            settings: number of steps, batch size, accumulation.
            pinned: put batches into memory that a GPU copies from while it computes.
        """
        self._make, self._settings, self._pinned = make, settings, pinned
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._keys: Iterator[tuple[int, range]] = iter(())
        self._pending: Future[Batch] | None = None
        self._waited, self._since = 0.0, time.monotonic()

    def start(self, step: int, attempt: int) -> None:
        """Go on with the batches of a step."""
        self._keys = (
            (drawn_step(s, attempt), slots(self._settings, part))
            for s in range(step, self._settings.steps)
            for part in range(self._settings.accumulate)
        )
        if self._pending is not None:
            self._pending.cancel()
        self._pending = self._ahead()

    def next(self) -> Batch:
        """Give the next batch, and begin to prepare the one after it."""
        current = self._pending
        assert current is not None
        self._pending = self._ahead()
        start = time.monotonic()
        batch = current.result()
        self._waited += time.monotonic() - start
        return batch

    def waiting(self) -> float:
        """Give the share of the time since the last call that training waited for batches."""
        now = time.monotonic()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return share

    def _ahead(self) -> Future[Batch] | None:
        key = next(self._keys, None)
        return None if key is None else self._pool.submit(self._prepare, *key)

    def _prepare(self, step: int, samples: range) -> Batch:
        batch = self._make(step, samples)
        return {name: value.pin_memory() for name, value in batch.items()} if self._pinned else batch

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)
