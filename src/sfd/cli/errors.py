"""Error messages and exit codes of the command line."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from sfd.utils import distributed
from sfd.utils.errors import Interrupted, SFDError


class Group(click.Group):
    """A command group that turns an SFDError into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C at any point gives its own message and exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT) from None

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; see `click.Group.main`."""
        try:
            return super().main(*args, **extra)
        except SFDError as error:
            if error.said_by_rank_0:
                time.sleep(1)  # a launcher that sees this rank end may end rank 0 before it has said so
            _exit_with("" if error.said_by_rank_0 else f"error: {error}", 2)
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            from sfd.utils import files

            _exit_with(f"error: {files.as_user_error(error, Path(error.filename or '.'))}", 2)
        except Interrupted as error:
            # torchrun would answer any other code by starting the ranks again.
            code = 0 if distributed.restarts_on_failure() else error.code
            _exit_with(str(error) if distributed.is_main_process() else "", code)
        except Exception as error:
            if not distributed.has_group():
                raise
            if not distributed.is_peer_failure(error):
                traceback.print_exc()
            _exit_with("a rank of this run failed; run the same command to resume", 1)


def _exit_with(message: str, code: int) -> NoReturn:
    if message:
        click.echo(f"sfd: {message}", err=True)
    if distributed.has_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # tearing a process group down would wait for ranks that are gone
    sys.exit(code)
