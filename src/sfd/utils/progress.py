"""Messages and progress on stderr."""

from __future__ import annotations

import sys
from typing import Any

from sfd.utils import distributed

SECONDS_BETWEEN_UPDATES = 15.0  # where stderr is no terminal


def say(message: str) -> None:
    """Print a message to stderr; of the ranks of a process group, rank 0 alone speaks."""
    if distributed.is_main_process() or not distributed.has_group():
        print(message, file=sys.stderr, flush=True)


def bar(description: str, total: int, done: int = 0) -> Any:
    """Show the progress of a block: a `tqdm` bar, which `update(count)` advances.

    Args:
        description: shown before the count.
        total: number of items.
        done: number of items done earlier (a resumed run).
    """
    from tqdm import tqdm

    silent = done >= total or (distributed.has_group() and not distributed.is_main_process())
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_UPDATES
    shown = {"dynamic_ncols": True, "mininterval": seconds, "maxinterval": seconds, "delay": 1e-9}
    return tqdm(desc=description, total=total, initial=done, file=sys.stderr, disable=silent, **shown)
