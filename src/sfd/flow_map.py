"""Few steps: a network that predicts each stream's mean velocity over its own time, and the steps that it takes.

The trajectory x(u) of a velocity field is a function of its starting point, so from base time u to r > u

    x_k(r) = x_k(u) + (τ_k(r) − τ_k(u))·m_k(x(u), τ(u), τ(r)),

where m_k is the mean over stream k's own time of its velocity along the trajectory (a flow map, Boffi et al. 2024,
arXiv 2406.07507, in the form of a mean velocity, Geng et al. 2025, arXiv 2505.13447). A stream at rest has
τ_k(r) = τ_k(u) and stays where it is, and a step may cross the schedule's knots: neither is a special case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfd.latents import CompositeLatent
from sfd.sampling import Progress, Result
from sfd.schedule import Schedule
from sfd.utils.errors import SFDError

MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""m(x, t, end): x (B, N) packed at the stream times t (K,), mean velocity up to end (K,); returns (B, N)."""


def step_counts(finest: int) -> list[int]:
    """The numbers of steps that divide `finest` by powers of two, ascending: 1, 2, 4, 8 of 8."""
    counts = [finest]
    while counts[-1] % 2 == 0:
        counts.append(counts[-1] // 2)
    return counts[::-1]


def coarsen(grid: Sequence[float], steps: int) -> Sequence[float]:
    """Base times of `steps` steps, out of those of the finest ones, both ends included."""
    counts = step_counts(len(grid) - 1)
    if steps not in counts:
        raise SFDError(f"this model was distilled for {', '.join(map(str, counts))} steps, but {steps} were given")
    return grid[:: (len(grid) - 1) // steps]


def mean_velocity(x: Tensor, after: Tensor, elapsed: Tensor) -> Tensor:
    """m between two states of a trajectory, 0 where no time has passed.

    Args:
        x, after: (B, N).
        elapsed: (B, N) or (N,), τ_k(r) − τ_k(u) of each entry's stream.
    """
    return torch.where(elapsed > 0, (after - x) / torch.where(elapsed > 0, elapsed, 1.0), 0.0)


def take_steps(
    mean: MeanVelocity,
    noise: Tensor,
    schedule: Schedule,
    latent: CompositeLatent,
    grid: Sequence[float],
    callback: Callable[[Progress], None] | None = None,
) -> Result:
    """Carry noise (B, N) to data by one evaluation of the mean velocity for each step of a grid of base times.

    The callback is called after each step, as by `sfd.sampling.integrate`.
    """
    times = schedule.at(torch.tensor(grid, dtype=torch.float64)).time
    x = noise
    for step, (t, end) in enumerate(pairwise(times), start=1):
        parts = zip(x.split(latent.sizes, 1), mean(x, t, end).split(latent.sizes, 1), (end - t).tolist(), strict=True)
        x = torch.cat([part + elapsed * m for part, m, elapsed in parts], dim=1)
        if callback is not None:
            callback(Progress(grid[step], end.to(x.dtype), x, step))
    return Result(x, len(grid) - 1)
