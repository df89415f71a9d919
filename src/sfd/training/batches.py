"""Batches, prepared by threads while earlier ones are being used."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from sfd.training.config import TrainSettings
from sfd.utils import distributed

Batch = dict[str, Tensor]

# After a rollback training draws its batches from so many steps further on: another order, other noise.
ATTEMPT_STEPS = 1 << 32
MOST_WORKERS = 8  # unless asked for: each holds a batch in memory


def parts(settings: TrainSettings) -> int:
    """The number of equal parts that a step's global batch is divided into."""
    return distributed.world_size() * settings.accumulate


def slots(settings: TrainSettings, part: int) -> range:
    """Give this process's slots of the global batch in one of a step's `accumulate` backward passes."""
    size = settings.batch_size // parts(settings)
    start = (part * distributed.world_size() + distributed.rank()) * size
    return range(start, start + size)


def drawn_step(step: int, attempt: int) -> int:
    """Give the step that a batch is asked for by: in attempt 0 the step itself."""
    return step + attempt * ATTEMPT_STEPS


def workers(settings: TrainSettings, device: torch.device) -> int:
    """Give the number of threads that prepare batches: what was asked for, or what suits the device.

    Where the CPU trains, its cores are busy with that, and one thread leaves them the most.
    """
    if settings.workers is not None:
        return settings.workers
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // distributed.local_world_size() - 1))


def _keep_to_itself(others: int) -> None:
    """Let PyTorch's operations use no other thread in this one; without, several would each use all cores at once.

    Args:
        others: the number of threads that operations of other threads use, and go on to.
    """
    torch.get_num_threads()  # a thread takes over the common number when it first asks, so that must lie behind it
    torch.set_num_threads(1)  # this thread's number, and the common one
    restoring = threading.Thread(target=torch.set_num_threads, args=(others,))
    restoring.start()
    restoring.join()


class Batches:
    """This process's batches in order, from any step and attempt on."""

    def __init__(
        self, make: Callable[[int, range], Batch], settings: TrainSettings, *, threads: int = 1, pinned: bool = False
    ) -> None:
        """Prepare nothing yet.

        Args:
            make: gives the slots of a step's global batch; called from several threads at once if there are several.
            settings: number of steps, batch size, accumulation.
            threads: how many batches are prepared at once, and so how many may lie ready.
            pinned: put batches into memory that a GPU copies from while it computes.
        """
        self._make, self._settings, self._threads, self._pinned = make, settings, threads, pinned
        begin = partial(_keep_to_itself, torch.get_num_threads()) if threads > 1 else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batches", initializer=begin)
        self._keys: Iterator[tuple[int, range]] = iter(())
        self._pending: deque[Future[Batch]] = deque()
        self._waited, self._since = 0.0, time.monotonic()

    def start(self, step: int, attempt: int) -> None:
        """Go on with the batches of a step."""
        self._keys = (
            (drawn_step(s, attempt), slots(self._settings, part))
            for s in range(step, self._settings.steps)
            for part in range(self._settings.accumulate)
        )
        for pending in self._pending:
            pending.cancel()
        self._pending.clear()
        for _ in range(self._threads):
            self._prepare_another()

    def next(self) -> Batch:
        """Give the next batch, and begin to prepare another."""
        self._prepare_another()
        start = time.monotonic()
        batch = self._pending.popleft().result()
        self._waited += time.monotonic() - start
        return batch

    def waiting(self) -> float:
        """Give the share of the time since the last call that training waited for batches."""
        now = time.monotonic()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return share

    def _prepare_another(self) -> None:
        key = next(self._keys, None)
        if key is not None:
            self._pending.append(self._pool.submit(self._prepare, *key))

    def _prepare(self, step: int, samples: range) -> Batch:
        batch = self._make(step, samples)
        return {name: value.pin_memory() for name, value in batch.items()} if self._pinned else batch

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)
