"""The training log: one JSON object per line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sfd.utils import distributed, files
from sfd.utils.errors import SFDError


class TrainingLog:
    """Averages scalars on the device; only writing a line waits for it.

    A value is a scalar, or a pair (sum, count) for what does not occur in every sample. What is not finite belongs to a
    skipped step and is left out. Resuming removes the lines of later steps. All ranks collect; rank 0 writes.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.path, self.batch_size, self.note = folder / "log.jsonl", batch_size, ""
        # By the names that are collected together: (names, 2), their sums and counts.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        # The first line after resuming averages over earlier steps too; its speed is of this process alone.
        self._steps, self._start = 0, time.monotonic()

    def start(self, step: int, state: Sequence[Any]) -> None:
        """Continue after a step, with what `state` gave for its checkpoint: lines of later steps are removed."""
        self._sums = {tuple(names): _of_rank(torch.tensor(sums)) for names, sums in state}
        self._steps, self._start = 0, time.monotonic()
        if not distributed.is_main_process():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened() as handle:
            handle.seek(0)
            lines = handle.readlines()
            # A killed process may have left the last line incomplete.
            while lines and not (lines[-1].endswith(b"}\n") and read_line(lines[-1], self.path)["step"] <= step):
                lines.pop()
            handle.truncate(sum(map(len, lines)))

    def collect(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add to the averages; scalars count with a weight, such as a micro-batch's part of the step."""
        scalars = {name: value.detach().float() for name, value in values.items() if value.ndim == 0}
        pairs = {name: value.detach().float() for name, value in values.items() if value.ndim == 1}
        rows = [torch.stack((value, torch.ones_like(value))) * weight for value in scalars.values()]
        table = torch.stack([*rows, *pairs.values()])
        table = torch.where(torch.isfinite(table).all(1, keepdim=True), table, 0)
        names = (*scalars, *pairs)
        self._sums[names] = table + self._sums[names].to(table.device) if names in self._sums else table

    def count_step(self) -> None:
        """Count a step for the speed."""
        self._steps += 1

    def write(self, step: int, extra: Mapping[str, float]) -> str:
        """Write a line with the averages and `extra`; give a note for the progress bar."""
        line: dict[str, float] = {"step": step}
        for names, sums in self._all_ranks():
            line |= {name: total / n for name, (total, n) in zip(names, sums.sum(0).tolist(), strict=True) if n}
        now = time.monotonic()
        speed = self._steps * self.batch_size / max(now - self._start, 1e-9)
        line |= {**extra, "images_per_second": speed}
        if distributed.is_main_process():
            with self._opened() as handle:
                handle.write(json.dumps(line).encode() + b"\n")
        self._sums, self._steps, self._start = {}, 0, now
        self.note = f"loss {line.get('loss', float('nan')):.4f}, {speed:.0f} images/s"
        return self.note

    def state(self) -> list[tuple[list[str], Any]]:
        """Give what each rank has collected since the last line, as JSON values; waits for the device.

        The lines so far are brought to the disk, so that a checkpoint never outlives the lines before it.
        """
        if distributed.is_main_process() and self.path.exists():
            with self._opened() as handle:
                os.fsync(handle.fileno())
        return [(list(names), sums.tolist()) for names, sums in self._all_ranks()]

    def _all_ranks(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Give the sums of all ranks, (ranks, names, 2), by the names that are collected together."""
        for names, sums in self._sums.items():
            gathered = sums.repeat(distributed.world_size(), 1, 1)
            if distributed.has_group():
                torch.distributed.all_gather(list(gathered), sums)
            yield names, gathered

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            with self.path.open("a+b") as handle:
                yield handle
        except OSError as error:
            raise files.as_user_error(error, self.path) from error


def read_line(line: bytes, path: Path) -> dict[str, float]:
    """Read a line of the log at a path."""
    try:
        values: dict[str, float] = json.loads(line)
        int(values["step"])  # which every line has
        return values
    except (ValueError, KeyError, TypeError) as error:
        raise SFDError(f"{path} is damaged ({error}); restore it, or remove it to continue without it") from None


def _of_rank(sums: Tensor) -> Tensor:
    """Give this rank's sums of (ranks, names, 2); those of another number of ranks all go to rank 0."""
    if len(sums) == distributed.world_size():
        return sums[distributed.rank()]
    return sums.sum(0) if distributed.is_main_process() else torch.zeros_like(sums[0])
