"""Euler's method: order 1, one evaluation a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfd.solvers._base import Callback, Velocity
from sfd.utils.config import Settings

ADAPTIVE = False


class Options(Settings):
    """Nothing to set."""


def solve(
    velocity: Velocity, x: Tensor, points: Sequence[float], options: Options, callback: Callback | None = None
) -> Tensor:
    """x ← x + h·f(u, x); see `Solver.solve`."""
    for u, following in pairwise(points):
        x = x + (following - u) * velocity(u, x)
        if callback is not None:
            callback(following, x)
    return x
