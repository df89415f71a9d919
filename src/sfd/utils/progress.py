"""Messages and progress on stderr."""

from __future__ import annotations

import sys

from tqdm import tqdm

from sfd.utils import distributed

SECONDS_BETWEEN_UPDATES = 15.0  # where stderr is no terminal


def say(message: str) -> None:
    """Print a message to stderr; of the ranks of a process group, rank 0 alone speaks."""
    if distributed.is_main_process() or not distributed.has_group():
        print(message, file=sys.stderr, flush=True)


class Bar(tqdm):
    """A bar without tqdm's thread, which would outlive it: a process with threads should not be forked."""

    monitor_interval = 0


def bar(description: str, total: int, done: int = 0) -> Bar:
    """Show the progress of a block; `update(count)` advances the bar.

    Args:
        description: shown before the count.
        total: number of items.
        done: number of items done earlier (a resumed run).
    """
    silent = done >= total or (distributed.has_group() and not distributed.is_main_process())
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_UPDATES
    shown = {"dynamic_ncols": True, "mininterval": seconds, "miniters": 1, "delay": 1e-9}
    return Bar(desc=description, total=total, initial=done, file=sys.stderr, disable=silent, **shown)
