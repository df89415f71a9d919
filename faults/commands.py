"""`sfd` commands as processes of their own, forked from this one, so that PyTorch is imported once."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfd.cli.main import main

SECONDS = 240.0
Condition = Callable[[], None]


class Failure(AssertionError):
    """A command did not do what was promised."""


@dataclass(frozen=True)
class Ended:
    """A process that ended."""

    code: int  # negative: the signal that ended it
    output: str

    @property
    def message(self) -> str:
        """The last sentence that the user saw from `sfd`; "" if there was none."""
        said = [line for line in self.output.splitlines() if line.startswith("sfd: ")]
        return said[-1].removeprefix("sfd: ") if said else ""

    def succeeded(self) -> Ended:
        """Insist on exit code 0."""
        return self.ended(0)

    def refused(self, *words: str) -> Ended:
        """Insist on exit code 2 and one sentence, without a traceback, that has all the words."""
        said = [line for line in self.output.splitlines() if "error" in line.lower()]
        if len(said) != 1 or any(word not in said[0] for word in words):
            raise Failure(f"expected one sentence with {words}, but the output was: {self.output[-1500:]}")
        return self.ended(2)

    def ended(self, *codes: int) -> Ended:
        """Insist on one of these exit codes, and on no traceback."""
        if self.code not in codes or "Traceback" in self.output:
            raise Failure(f"expected exit code {codes}, got {self.code}; the output was: {self.output[-1500:]}")
        return self


class Command:
    """A running `sfd` command."""

    def __init__(self, arguments: Sequence[object], output: Path, conditions: Sequence[Condition] = ()) -> None:
        """Start `sfd ARGUMENTS`, print to a file, and call the conditions in the new process first."""
        self._output, self._start = output, time.monotonic()
        self._ended: Ended | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_child([str(argument) for argument in arguments], output, conditions))

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                text = self._output.read_text(encoding="utf-8", errors="replace")
                self._ended = Ended(os.waitstatus_to_exitcode(status), text)
        return self._ended is None

    def until(self, condition: Callable[[], object], pause: float = 0.001) -> bool:
        """Wait for something to come true; False if the command ended before."""
        while self.running():
            if condition():
                return True
            self._check_time()
            time.sleep(pause)
        return False

    def send(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.running():
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for the end."""
        self.until(lambda: False, 0.005)
        assert self._ended is not None
        return self._ended

    def _check_time(self) -> None:
        if time.monotonic() - self._start > SECONDS:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise Failure(f"the command hangs: it did not end in {SECONDS:.0f} s; {self._output.read_text()[-500:]}")


def _child(arguments: list[str], output: Path, conditions: Sequence[Condition]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(written, stream)
    try:
        for condition in conditions:
            condition()
        main(arguments, prog_name="sfd")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
