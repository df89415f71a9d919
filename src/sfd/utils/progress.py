"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
SECONDS_BETWEEN_LINES = 15.0


class Bar:
    """Counts one piece of work; `note` is what is worth knowing beside the count (loss, images a second)."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self.description, self.total, self.done, self.note = description, total, done, ""
        self._first, self._start, self._last_line = done, time.monotonic(), time.monotonic()
        self._progress: Progress | None = None
        if console.is_terminal and not console.quiet:
            columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            text = TextColumn("{task.description}")
            self._progress = Progress(text, BarColumn(), *columns, TextColumn("{task.fields[note]}"), console=console)
            self._task = self._progress.add_task(description, total=total, completed=done, note="")
            self._progress.start()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more as done."""
        self.reach(self.done + count, note)

    def reach(self, done: int, note: str | None = None) -> None:
        """Count `done` in all as done; it may be less than before."""
        self.done = done
        self.note = self.note if note is None else note
        if self._progress:
            self._progress.update(self._task, completed=self.done, note=self.note)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        rate = max(self.done - self._first, 0) / max(time.monotonic() - self._start, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else "done"
        if not console.quiet:
            line = f"{self.description}: {self.done}/{self.total}, {left} {self.note}".rstrip()
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar down, or write the last line."""
        if self._progress:
            self._progress.stop()
        elif self.done > self._first:
            self._line()


@contextmanager
def bar(description: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show the progress of the block.

    Args:
        description: what is being done.
        total: how much there is to do.
        done: how much of it was done before (a resumed run).
    """
    shown = Bar(description, total, done)
    try:
        yield shown
    finally:
        shown.close()
