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


class ByStream(click.ParamType):
    """A number for all streams, or by stream: semantic=1.5,texture=2."""

    name = "number"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> float | dict[str, float]:
        """Read the number, or the numbers by name."""
        pairs = [part.partition("=") for part in value.split(",")]
        try:
            found = {name.strip(): float(g) for name, _, g in pairs} if "=" in value else float(value)
            if isinstance(found, dict) and len(found) < len(pairs):
                self.fail(f"{value!r} names a stream twice", param, ctx)
            return found
        except ValueError:
            self.fail(f"{value!r} is neither a number nor, by stream, such as semantic=1.5,texture=2", param, ctx)


FOLDER = UserPath()
BY_STREAM = ByStream()
MAX_HOURS_HELP = "checkpoint and exit with code 75 after this many hours; rerun the command to resume"
guidance_option = click.option(
    "--guidance", type=BY_STREAM, help="scale, or by stream: semantic=1.5,texture=2; 1, also of a stream left out: none"
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps …")
