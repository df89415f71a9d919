"""The training log: one JSON object a line, the same numbers to TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd import files


class TrainingLog:
    """Averages the scalars between two lines where they were computed; only a line waits for the device.

    (The training step itself does wait once, to learn whether its gradient is finite.) Lines past the step that a run
    resumes from are taken off: the log reads as if nothing had happened.
    """

    def __init__(self, folder: Path, step: int, batch_size: int, *, enabled: bool) -> None:
        self.path, self.batch_size, self.enabled, self.note = folder / "log.jsonl", batch_size, enabled, ""
        self._sums: dict[str, Tensor] = {}
        # A resumed run's first line averages over steps of both processes; its speed is of this one's alone.
        self._count, self._count_here, self._start = 0, 0, time.monotonic()
        self._board: Any = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            with self._explaining():
                self._cut(step)
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def _cut(self, step: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        files.write_text(self.path, "".join(line + "\n" for line in kept))

    def collect(self, values: dict[str, Tensor]) -> None:
        """Add a step's scalars to the running average."""
        for name, value in values.items():
            self._sums[name] = value + self._sums[name].to(value.device) if name in self._sums else value
        self._count += 1
        self._count_here += 1

    def write(self, step: int, values: dict[str, Tensor], extra: dict[str, float]) -> str:
        """Add a step's scalars, write the line, and give the note for the progress bar.

        Raises:
            SFDError: the disk is full, or the folder cannot be written to.
        """
        self.collect(values)
        now = time.monotonic()
        line: dict[str, float] = {"step": step}
        line |= {name: float(total) / self._count for name, total in self._sums.items()} | extra
        line["images_per_second"] = self._count_here * self.batch_size / max(now - self._start, 1e-9)
        self.note = f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s"
        if self.enabled:
            with self._explaining():
                with self.path.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(line) + "\n")
                for name, value in line.items():
                    if name != "step":
                        self._board.add_scalar(name, value, step)
        self._sums, self._count, self._count_here, self._start = {}, 0, 0, now
        return self.note

    def state(self) -> dict[str, Any]:
        """Give what has been collected since the last line, for a checkpoint."""
        return {"count": self._count, "sums": {name: float(total) for name, total in self._sums.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`; an empty one changes nothing."""
        if state:
            self._count = int(state["count"])
            self._sums = {name: torch.tensor(total) for name, total in state["sums"].items()}

    def close(self) -> None:
        """Write what is buffered and stop TensorBoard's thread.

        Raises:
            SFDError: the disk is full, or the folder cannot be written to.
        """
        if self._board is not None:
            with self._explaining():
                self._board.close()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise files.explained(error, self.path) from error
