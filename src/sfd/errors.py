"""What a user did wrong, said in one sentence."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class SFDError(Exception):
    """A problem that the user can mend. The message says what was given, what was expected and how to fix it.

    The command line prints it without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """Work was asked to stop, saved its state and left. `code` is the process's exit code (128 + signal)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; run the same command to go on")
        self.code = 128 + signal_number


def unknown(kind: str, given: str, choices: Iterable[str]) -> SFDError:
    """Build the error for a name that does not exist, with the nearest right one.

    >>> str(unknown("solver", "eulr", ["euler", "heun"]))
    "there is no solver 'eulr'; did you mean 'euler'? (known: euler, heun)"
    """
    names = sorted(choices)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return SFDError(f"there is no {kind} {given!r}{hint} (known: {', '.join(names) or 'none'})")
