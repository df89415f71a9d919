"""Batches, each prepared by a thread while the one before it is being used."""

from __future__ import annotations

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

    def __init__(self, make: Callable[[int, range], Batch], settings: TrainSettings) -> None:
        self._make, self._settings = make, settings
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._keys: Iterator[tuple[int, range]] = iter(())
        self._pending: Future[Batch] | None = None

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
        return current.result()

    def _ahead(self) -> Future[Batch] | None:
        key = next(self._keys, None)
        return None if key is None else self._pool.submit(self._make, *key)

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)
