"""The training log: one JSON object a line, the same numbers to TensorBoard."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd.utils import distributed, files
from sfd.utils.errors import SFDError


class TrainingLog:
    """Averages scalars between two lines where they were computed; only a line waits for the device.

    A value is a scalar, or a pair (sum, count) for what does not occur in every sample. What is not finite belongs to a
    skipped step and is left out. Lines past the step that a run resumes from are taken off: the log reads as if nothing
    had happened. All processes collect and write together; the leading one has the files.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.path, self.batch_size, self.note = folder, folder / "log.jsonl", batch_size, ""
        # By the names that are collected together: (names, 2), their sums and counts.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        # A resumed run's first line averages over steps of both processes; its speed is of this one's alone.
        self._steps_here, self._start = 0, time.monotonic()
        self._board: Any = None

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on after a step, with what a checkpoint's `state` had collected.

        Raises:
            SFDError: the log is damaged, or the folder cannot be written to.
        """
        self.close()
        self._sums = {tuple(names.split()): _own(torch.tensor(sums)) for names, sums in state.items()}
        if distributed.is_main_process():
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _all_but_tensorboard
            with self._explaining():
                self._cut(step)
                self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def _cut(self, step: int) -> None:
        """Take lines past a step off the end, and what a killed process has half written there; read no others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as handle:
            handle.seek(0)
            data = handle.read()
            end = len(data)
            while end:
                start = data.rfind(b"\n", 0, end - 1) + 1
                line = data[start:end]
                if line.endswith(b"}\n") and read_line(line, self.path)["step"] <= step:
                    break
                end = start
            handle.truncate(end)

    def collect(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add to the running averages; `share` is what part of the step scalars come from."""
        scalars = {name: value.detach().float() for name, value in values.items() if value.ndim == 0}
        pairs = {name: value.detach().float() for name, value in values.items() if value.ndim == 1}
        rows = [torch.stack((each, torch.ones_like(each)), 1) * share for each in _stacked(scalars)]
        table = torch.cat([*rows, *_stacked(pairs)])
        table = torch.where(torch.isfinite(table).all(1, keepdim=True), table, 0)
        names = (*scalars, *pairs)
        self._sums[names] = table + self._sums[names].to(table.device) if names in self._sums else table

    def step(self) -> str:
        """Count a step; give the note for the progress bar."""
        self._steps_here += 1
        return self.note

    def write(self, step: int, extra: Mapping[str, float]) -> str:
        """Write a line, averages and what is `extra`; give the note for the progress bar.

        Raises:
            SFDError: the disk is full, or the folder cannot be written to.
        """
        line: dict[str, float] = {"step": step}
        for names, sums in self._gathered():
            line |= {name: total / n for name, (total, n) in zip(names, sums.sum(0).tolist(), strict=True) if n}
        now = time.monotonic()
        speed = self._steps_here * self.batch_size / max(now - self._start, 1e-9)
        line |= {**extra, "images_per_second": speed}
        self.note = f"loss {line.get('loss', float('nan')):.4f}, {speed:.0f} images/s"
        if self._board is not None:
            with self._explaining():
                with self.path.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(line) + "\n")
                for name, value in line.items():
                    if name != "step":
                        self._board.add_scalar(name, value, step)
        self._sums, self._steps_here, self._start = {}, 0, now
        return self.note

    def state(self) -> dict[str, list[list[list[float]]]]:
        """Give what each process has collected since the last line, for a checkpoint; waits for the device."""
        return {" ".join(names): sums.tolist() for names, sums in self._gathered()}

    def _gathered(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Give the sums of all processes, (processes, names, 2), by the names that are collected together."""
        for names, sums in self._sums.items():
            each = sums.repeat(distributed.world_size(), 1, 1)
            if distributed.world_size() > 1:
                torch.distributed.all_gather(list(each), sums)
            yield names, each

    def settle(self) -> None:
        """Bring the lines to the disk, so that a checkpoint never outlives the lines before it."""
        if self._board is not None:
            with self._explaining(), self.path.open("a", encoding="utf-8") as handle:
                os.fsync(handle.fileno())

    def close(self) -> None:
        """Write what is buffered and stop TensorBoard's thread.

        Raises:
            SFDError: the disk is full, or the folder cannot be written to.
        """
        if self._board is not None:
            board, self._board = self._board, None
            try:
                with self._explaining():
                    board.close()
            finally:
                threading.excepthook = threading.__excepthook__

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise files.as_user_error(error, self.path) from error


def read_line(line: bytes, path: Path) -> dict[str, float]:
    """Read a line of the log at a path.

    Raises:
        SFDError: it is damaged.
    """
    try:
        values: dict[str, float] = json.loads(line)
        int(values["step"])  # which every line has
        return values
    except (ValueError, KeyError, TypeError) as error:
        raise SFDError(f"{path} is damaged ({error}); restore it, or remove it to go on without it") from None


def _own(sums: Tensor) -> Tensor:
    """Give this process the sums that it saved; of another number of processes, the leading one gets all."""
    sums = sums.reshape(-1, *sums.shape[-2:])  # the first checkpoints held those of all processes as one
    return (
        sums[distributed.rank()]
        if len(sums) == distributed.world_size()
        else sums.sum(0) * float(distributed.is_main_process())
    )


def _stacked(values: Mapping[str, Tensor]) -> list[Tensor]:
    return [torch.stack(list(values.values()))] if values else []


def _all_but_tensorboard(problem: threading.ExceptHookArgs) -> None:
    """Report what ends a thread, but for TensorBoard's: it raises again, in the thread that logs, what it met."""
    if type(problem.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(problem)
