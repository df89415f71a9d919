"""How the command ends: what a user can mend as one sentence, stops with codes of their own, all processes together."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from sfd.utils import distributed
from sfd.utils.errors import Interrupted, SFDError


class Group(click.Group):
    """Turns what a user can mend into one sentence and exit code 2."""

    _in_parts = False  # whether the processes that a launcher started know nothing of each other

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C, wherever it comes, leaves with its own message and code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command; only those of a recipe use a process group."""
        name, command, rest = super().resolve_command(ctx, args)
        names = {parameter.name for parameter in command.params} if command is not None else set()
        self._in_parts = "recipe" not in names
        return name, command, rest

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; see `click.Group.main`."""
        try:
            return super().main(*args, **extra)
        except SFDError as error:
            self._leave(str(error), 2)
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            from sfd.utils import files

            self._leave(str(files.as_user_error(error, Path(error.filename or "."))), 2)
        except Interrupted as error:
            # An elastic launcher would answer any other code by starting the run again.
            self._leave(str(error), 0 if distributed.elastic() else error.code)
        except Exception as error:
            company = distributed.company()
            if company is None:
                raise
            what = "another process of this run" if distributed.lost(error) else "one process of this run"
            if not distributed.lost(error):
                traceback.print_exc()
            code = company.failed()
            self._leave(f"{what} ended; run the same command to go on", 1 if code is None else code)

    def _leave(self, message: str, code: int) -> NoReturn:
        """Say why and end, and all of the run's processes with this one; the first to end speaks for them."""
        company = distributed.company()
        if company.fail(code) if company else self._in_parts or distributed.is_main_process():
            click.echo(f"sfd: {message}" if code != 2 else f"sfd: error: {message}", err=True)
        if company:
            sys.stderr.flush()
            os._exit(code)  # without waiting for what other processes will not answer any more
        sys.exit(code)
