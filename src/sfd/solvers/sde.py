"""A stochastic sampler: noise is put back before each step of Heun's method (Karras et al. 2022, arXiv 2206.00364).

On straight paths the stochastic equation with the same marginals as dx/dt = v is, for any g(t) ≥ 0,

    dx = (v + g²/2·∇log p) dt + g dw,    ∇log p = −E[x0 | x] / (1 − t) = (t·v − x) / (1 − t).

Its last two terms alone leave the marginals as they are. With g² = 2η·(1 − t)/t they are, over a time dt, the way back
from t to t − η·dt in the noising process and the way forward again along v. The way back is known exactly,

    x(t̂) = t̂/t·x(t) + √((1 − t̂)² − (t̂/t·(1 − t))²)·ξ,    ξ ~ N(0, 1),    t̂ ≤ t,

so it is taken so, each stream on its own clock; it adds no error, and no score is divided by 1 − t. What remains is
Heun's error over a step 1 + η times as long. Noise is drawn anew at each step, from the image's seed and the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pydantic import Field
from torch import Tensor

from sfd.solvers._base import Callback, Velocity
from sfd.utils.config import Settings

ADAPTIVE = False


class Options(Settings):
    """How much noise."""

    noise: float = Field(0.5, ge=0, description="η: how far back, in steps; 0 is Heun's method itself")


def solve(
    velocity: Velocity, x: Tensor, points: Sequence[float], options: Options, callback: Callback | None = None
) -> Tensor:
    """Back to u − η·h, but not beyond the piece, and from there to u + h; see `Solver.solve`."""
    for u, following in pairwise(points):
        back = max(points[0], u - options.noise * (following - u))
        if back < u:
            x = velocity.renoise(x, u, back)
        h = following - back
        start = velocity(back, x)
        end = velocity(following, x + h * start)
        x = x + h / 2 * (start + end)
        if callback is not None:
            callback(following, x)
    return x
