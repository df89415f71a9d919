"""Flows with a known solution, and the order of a solver on them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sfd.latents import CompositeLatent, Stream
from sfd.models.toy import GaussianMixture

STREAMS = ("texture", "semantic")
COMPOSITE = CompositeLatent(
    streams=(Stream(name="texture", channels=1, grid=2, patch_size=2), Stream(name="semantic", channels=2, grid=1))
)
SCHEDULES = {
    "offset": {"name": "offset", "delta": 0.3},
    "beyond one": {"name": "offset", "delta": 1.5},
    "synchronous": {"name": "synchronous"},
    "sequential": {"name": "sequential"},
    "table": {
        "name": "table",
        "points": {"texture": [[0, 0], [0.37, 0.1], [0.8, 0.5], [1, 1]], "semantic": [[0, 0], [0.21, 0.5], [1, 1]]},
    },
}
ORDERS = {  # solver and options, as `integrate` takes them, and the order of the error in the step
    "euler": ({"solver": "euler"}, 1),
    "heun": ({"solver": "heun"}, 2),
    "multistep 2": ({"solver": "multistep", "options": {"order": 2}}, 2),
    "multistep 3": ({"solver": "multistep", "options": {"order": 3}}, 3),
}


def mixture(components: int, seed: int = 0) -> GaussianMixture:
    draw = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(components, COMPOSITE.size, generator=draw, dtype=torch.float64)
    stds = 0.4 + 0.8 * torch.rand(components, COMPOSITE.size, generator=draw, dtype=torch.float64)
    return GaussianMixture(COMPOSITE, torch.ones(components, dtype=torch.float64), means, stds)


def order(error: Callable[[int], float], steps: int) -> float:
    """Fit the slope of log(error) against log(step) over three doublings of the number of steps."""
    counts = [steps * 2**k for k in range(4)]
    x, y = [math.log(1 / n) for n in counts], [math.log(error(n)) for n in counts]
    mean_x, mean_y = sum(x) / 4, sum(y) / 4
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def check_order(error: Callable[[int], float], name: str, steps: int = 60) -> None:
    """The slope is the solver's order; above it while a multistep method's terms of higher order still weigh."""
    slack = (0.4, 0.6) if name.startswith("multistep") else (0.12, 0.12)
    assert -slack[0] < order(error, steps) - ORDERS[name][1] < slack[1]
