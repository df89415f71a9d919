"""Dormand and Prince's method with step sizes of each image's own."""

from __future__ import annotations

import torch
from torch import Tensor

from sfd.solvers._base import Velocity
from sfd.utils.errors import SFDError

# Coefficients of Dormand & Prince (1980). The last stage is the next step's first.
NODES = (0.2, 0.3, 0.8, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, LEAST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0  # of the next step to this one, as torchdiffeq has them
TOO_SMALL = 1e-13  # a step of this share of the piece would not move the base time


def solve_by_image(velocity: Velocity, x: Tensor, start: float, end: float, rtol: float, atol: float) -> Tensor:
    """Integrate every image with its own steps; all take part in each call, and those that have arrived stand still.

    Args:
        velocity: called with base times (B,), float64 on the CPU, and which images still move.
        x: (B, M).
        start, end: the piece.
        rtol, atol: error allowed in a step, atol + rtol·|x|, root mean square over the image.

    Raises:
        SFDError: an image's state is no longer finite, or its step became too small to go on.
    """
    u = torch.full((len(x),), start, dtype=torch.float64)
    moving = torch.ones(len(x), dtype=torch.bool)
    first = velocity(u, x, moving)
    h = _first_step(velocity, u, x, first, end, rtol, atol)
    while moving.any():
        h = torch.minimum(h, end - u)
        column = h[:, None].to(x)
        slopes = [first]
        for node, row in zip(NODES, STAGES, strict=True):
            y = x + column * _weighted(row, slopes)
            slopes.append(velocity(torch.clamp(u + node * h, max=end), y, moving))
        # y is the step's result: the last stage's weights are those of the solution.
        scale = atol + rtol * torch.maximum(x.abs(), y.abs())
        size = _norm(column * _weighted(ERROR, slopes) / scale)
        if not bool((size[moving].isfinite() & (h[moving] > TOO_SMALL * (end - start))).all()):
            raise SFDError(
                f"dopri5 cannot go on between u = {start:.4g} and {end:.4g}: a step became too small, or a state is "
                f"not finite; allow a larger error than rtol {rtol} and atol {atol}, or take a solver with fixed steps"
            )
        taken = moving & (size <= 1)
        there = taken[:, None].to(x.device)
        x, first = torch.where(there, y, x), torch.where(there, slopes[-1], first)
        u = torch.where(taken, torch.where(end - (u + h) < TOO_SMALL * (end - start), end, u + h), u)
        least = torch.where(size < 1, 1.0, LEAST_FACTOR)
        h = h * (SAFETY * size.clamp(min=1e-10) ** -0.2).clamp(max=LARGEST_FACTOR).maximum(least)
        moving = u < end
    return x


def _first_step(
    velocity: Velocity, u: Tensor, x: Tensor, first: Tensor, end: float, rtol: float, atol: float
) -> Tensor:
    """Guess the first step of each image, (B,); Hairer, Nørsett & Wanner I, II.4."""
    scale = atol + rtol * x.abs()
    state, slope = _norm(x / scale), _norm(first / scale)
    h = torch.where((state < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * state / slope).minimum(end - u)
    second = velocity(u + h, x + h[:, None].to(x) * first, torch.ones(len(x), dtype=torch.bool))
    bend = _norm((second - first) / scale) / h
    largest = torch.maximum(slope, bend)
    return torch.minimum(100 * h, torch.where(largest <= 1e-15, (1e-3 * h).clamp(min=1e-6), (0.01 / largest) ** 0.2))


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * slope
    return total


def _norm(values: Tensor) -> Tensor:
    """Root mean square over each image: (B,), float64 on the CPU, where steps are decided."""
    return values.square().mean(dim=1).sqrt().cpu().double()
