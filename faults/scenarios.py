"""What a row of the table is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from faults.runs import Place


@dataclass(frozen=True)
class Scenario:
    """One fault: what happens, and what must hold afterwards."""

    fault: str
    attempt: Callable[[Place], str]
    """Does it, checks that nothing is lost, and gives what the user was told; raises `Failure`, or `Lost`."""
    tries: int = 1
    quick: bool = False
    """One try of it belongs to `make test`."""
    root: bool = False
    """It takes the rights of root."""
