"""Messages and progress on stderr: a line that is rewritten on a terminal, a new line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sfd.utils import distributed

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_UPDATES = 0.1  # on a terminal


def say(message: str, end: str = "\n") -> None:
    """Print a message to stderr; of the ranks of a process group, rank 0 alone speaks."""
    if distributed.is_main_process() or not distributed.has_group():
        print(message, end=end, file=sys.stderr, flush=True)


class Progress:
    """Counts one piece of work; `note` stands next to the count (loss, images per second)."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self.description, self.total, self.done, self.note = description, total, done, ""
        self._first, self._start, self._shown = done, time.monotonic(), time.monotonic()
        self._terminal = sys.stderr.isatty()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more as done."""
        self.done += count
        self.note = self.note if note is None else note
        if time.monotonic() - self._shown >= (SECONDS_BETWEEN_UPDATES if self._terminal else SECONDS_BETWEEN_LINES):
            self.show()

    def show(self) -> None:
        """Show the present state."""
        self._shown = time.monotonic()
        rate = max(self.done - self._first, 0) / max(self._shown - self._start, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else "done"
        line = f"{self.description}: {self.done}/{self.total}, {left} {self.note}".rstrip()
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            say(f"\r{line[:width]:<{width}}", end="")
        else:
            say(line)


@contextmanager
def bar(description: str, total: int, done: int = 0) -> Iterator[Progress]:
    """Show the progress of the block.

    Args:
        description: shown before the count.
        total: number of items.
        done: number of items done earlier (a resumed run).
    """
    progress = Progress(description, total, done)
    try:
        yield progress
    finally:
        if progress.done > done:
            progress.show()
            if sys.stderr.isatty():
                say("")
