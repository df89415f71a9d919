"""Errors that a user can mend.

Every function of the project raises `SFDError` for what its caller or a user did wrong: a bad setting, a missing or
damaged file, a full disk. Docstrings do not repeat it.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class SFDError(Exception):
    """A problem that the user can mend. Its message is one sentence: what was given, what was expected, how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str = "", *, said_by_rank_0: bool = False) -> None:
        super().__init__(message)
        self.said_by_rank_0 = said_by_rank_0  # rank 0 raises it too, and prints it


TIME_IS_OVER = 75  # EX_TEMPFAIL in sysexits.h: try again later


class Interrupted(BaseException):
    """Work stopped on request, with its state saved. `code` is the process's exit code.

    That is 128 + signal, so 130 for Ctrl-C and 143 for SIGTERM; but 75 for SIGUSR1, the end of the time limit.
    Like KeyboardInterrupt it is not an `Exception`, so that handlers of errors do not catch it.
    """

    def __init__(self, signal_number: int) -> None:
        over = signal_number == getattr(signal, "SIGUSR1", None)
        reason = "the time is over" if over else f"stopped by {signal.Signals(signal_number).name}"
        super().__init__(f"{reason}; run the same command to resume")
        self.code = TIME_IS_OVER if over else 128 + signal_number


def unknown(kind: str, given: str, choices: Iterable[str]) -> SFDError:
    """Build the error for a name that does not exist, with the nearest right one.

    >>> str(unknown("solver", "eulr", ["euler", "heun"]))
    "there is no solver 'eulr'; did you mean 'euler'? (known: euler, heun)"
    """
    names = sorted(choices)
    near = difflib.get_close_matches(given, names, n=1) or [name for name in names if given and given in name]
    separator = "; " if any("," in name for name in names) else ", "  # classes of ImageNet have commas in their names
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return SFDError(f"there is no {kind} {given!r}{hint} (known: {separator.join(names) or 'none'})")
