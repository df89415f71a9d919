"""Adams methods of order 2 and 3: one evaluation a step, each used three times.

The velocity at a step's start (a) corrects the step before it, (b) predicts this one and (c) stays in the history:
Adams-Bashforth predicts, Adams-Moulton of the same order corrects, and the prediction's velocity is not evaluated
again (PEC; Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, III.1 and III.5 for steps of any
length). UniPC (Zhao et al. 2023, arXiv 2302.04867) found the corrector that costs nothing for diffusion models.

All interpolate dx/du as a polynomial in u. DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) interpolates the
predicted data in the logarithm of the signal-to-noise ratio, which suits curved noise schedules; on straight paths
the velocity itself is the smoother function, and the error several times smaller (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd.solvers._base import Callback, Velocity
from sfd.utils.config import Settings

ADAPTIVE = False

_History = list[tuple[float, Tensor]]  # base times and velocities there, ascending


class Options(Settings):
    """Which method of the family."""

    order: int = Field(3, ge=2, le=3, description="how many velocities each polynomial goes through")


def solve(
    velocity: Velocity, x: Tensor, points: Sequence[float], options: Options, callback: Callback | None = None
) -> Tensor:
    """Predict, evaluate, correct; see `Solver.solve`. The callback sees predictions, which are corrected after.

    The first step predicts with Euler's method and corrects with the trapezoidal rule; its error, of order 3 once a
    piece, costs neither order. The last one is not corrected: that would take an evaluation more.
    """
    history: _History = []
    left = x  # the corrected state that the step before set out from
    for u, following in pairwise(points):
        now = velocity(u, x)
        if history:
            x = _integrated(left, [*history, (u, now)][-options.order :], history[-1][0], u)
        left = x
        history = [*history, (u, now)][-options.order :]
        x = _integrated(left, history, u, following)
        if callback is not None:
            callback(following, x)
    return x


def _integrated(x: Tensor, nodes: _History, start: float, end: float) -> Tensor:
    """Add to x the integral from start to end of the polynomial through the nodes."""
    (first, *others), (f, *values) = adams_weights(tuple(u for u, _ in nodes), start, end), [f for _, f in nodes]
    total = torch.add(x, f, alpha=first)
    for weight, f in zip(others, values, strict=True):
        total.add_(f, alpha=weight)
    return total


@lru_cache(maxsize=4096)  # each batch of a sampling asks for the same ones
def adams_weights(nodes: tuple[float, ...], start: float, end: float) -> tuple[float, ...]:
    """Weigh values at the nodes so that their sum is the integral of the polynomial through them."""
    # In units of the interval from its start: far better conditioned than in u, where short steps all look alike.
    places = (np.array(nodes) - start) / (end - start)
    powers = np.arange(len(nodes))
    weights = np.linalg.solve(np.vander(places, increasing=True).T, 1 / (powers + 1))
    return tuple(float(w) for w in (end - start) * weights)
