"""Heun's method (the explicit trapezoidal rule): order 2, two evaluations a step."""

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
    """x ← x + h/2·(f(u, x) + f(u + h, x + h·f(u, x))); see `Solver.solve`."""
    for u, following in pairwise(points):
        h = following - u
        start = velocity(u, x)
        end = velocity(following, x + h * start)
        x = x + h / 2 * (start + end)
        if callback is not None:
            callback(following, x)
    return x
