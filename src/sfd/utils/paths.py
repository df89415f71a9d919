"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand_home(text: str) -> str:
    """Put the home folder for a leading `~`, unless there is something of that very name."""
    return text if os.path.lexists(text) else os.path.expanduser(text)  # noqa: PTH111


def user_path(text: str | Path) -> Path:
    """The path of a command's argument, which no shell expands in --out=~/runs.

    A leading `./`, which says that no shipped recipe or model is meant, would be lost in a path: it becomes absolute.
    """
    given = expand_home(str(text))
    return Path(given).absolute() if given.startswith("./") else Path(given)
