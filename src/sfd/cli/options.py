"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sfd.utils.paths import user_path


class UserPath(click.ParamType):
    """A path in which `~` stands for the home folder; no shell expands it in --out=~/runs."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Turn a command's argument into a path."""
        return user_path(value)


FOLDER = UserPath()
MAX_HOURS_HELP = "checkpoint and exit with code 75 after this many hours; rerun the command to resume"
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps …")
