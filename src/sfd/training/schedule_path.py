"""The schedule of two streams that costs least: a shortest path through the square of their times.

Let e_k(t_0, t_1) be the error of stream k's velocity, as mean square, where the streams are at times t_0 and t_1. A
network that is trained on each stream's own time uniformly, along a schedule τ, has the loss

    ∫ Σ_k e_k(τ(u)) τ_k′(u) du = ∫ Σ_k e_k dτ_k,

a line integral in the square: it depends on the path from (0, 0) to (1, 1), not on the speed along it. By Green's
theorem two paths differ by the integral of ∂e_1/∂t_0 − ∂e_0/∂t_1 over the area between them, so stream 0 should lead
where more of it lowers the error of stream 1 by more than the other way round.

The base time along a path is its length in the maximum norm, so the path of `offset`, of length 1 + Δ, becomes `offset`
itself. A price on length keeps paths away from the corners of the square; a price on bends keeps knots few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sfd import flow
from sfd.latents import CompositeLatent
from sfd.schedule import Schedule

MOVES = ((1, 1), (1, 0), (0, 1), (1, 2), (2, 1))
"""Steps of a path on the grid, of stream 0 and of stream 1."""
EDGE = 0.01  # errors at times 0 and 1 are measured this far inside


class Path(NamedTuple):
    """A path on the grid and what it costs."""

    points: tuple[tuple[int, int], ...]  # grid points from (0, 0) to (G, G), each one of `MOVES` after the last
    cost: float


@torch.no_grad()
def measure_errors(
    model: nn.Module, composite: CompositeLatent, batch: dict[str, Tensor], grid: int, batch_size: int
) -> np.ndarray:
    """Measure each stream's velocity error at a grid of times, everywhere on the same images and noise.

    Args:
        model: network of two streams that was trained at independent times.
        composite, batch_size: the streams, and how many images at once.
        batch: data x1 and noise x0 (B, N), labels (B,).
        grid: G, intervals of each stream's time.

    Returns:
        Mean squares per entry, float64 (2, G + 1, G + 1); [k, i, j] is e_k(i / G, j / G).
    """
    ticks = torch.linspace(0, 1, grid + 1).clamp(EDGE, 1 - EDGE).to(batch["x1"])
    errors = np.zeros((2, grid + 1, grid + 1))
    count = len(batch["x1"])
    for i, j in np.ndindex(grid + 1, grid + 1):
        for start in range(0, count, batch_size):
            part = {name: values[start : start + batch_size] for name, values in batch.items()}
            times = torch.stack((ticks[i], ticks[j])).expand(len(part["x1"]), 2)
            x = flow.interpolate(part["x1"], part["x0"], composite.per_entry(times))
            found = model(x, times, part["labels"]).velocity
            squares = composite.unpack((found.float() - flow.velocity_target(part["x1"], part["x0"])).square())
            errors[:, i, j] += [float(each.flatten(1).mean(1).sum()) for each in squares.values()]
    return errors / count


def move_costs(errors: np.ndarray, move: tuple[int, int]) -> np.ndarray:
    """Integrate Σ_k e_k dτ_k along one move (a, b) from every grid point where it fits: (G + 1 − a, G + 1 − b).

    Trapezoids between the grid lines that the move crosses; e is linear between grid points.
    """
    grid, parts = errors.shape[1] - 1, max(move)
    along = sum(errors[k] * move[k] / grid for k in (0, 1))
    rows, columns = grid + 1 - move[0], grid + 1 - move[1]
    total = np.zeros((rows, columns))
    for part in range(parts + 1):
        weight = (0.5 if part in (0, parts) else 1.0) / parts
        i, j = (part * step / parts for step in move)
        for row, column in {(f(i), g(j)) for f in (math.floor, math.ceil) for g in (math.floor, math.ceil)}:
            share = (1 - abs(row - i)) * (1 - abs(column - j))
            total += weight * share * along[row : row + rows, column : column + columns]
    return total


def shortest_path(errors: np.ndarray, length: float = 0.0, bend: float = 0.0) -> Path:
    """Find the best monotone path from (0, 0) to (1, 1), exactly, by dynamic programming.

    Args:
        errors: (2, G + 1, G + 1), each stream's error on a grid of times.
        length: price of a path's length; a path along the diagonal has length 1.
        bend: price of each change of direction.
    """
    grid = errors.shape[1] - 1
    costs = [move_costs(errors, move) + length * max(move) / grid for move in MOVES]
    best = np.full((grid + 1, grid + 1, len(MOVES)), np.inf)  # of paths to a point, by their last move
    before = np.zeros(best.shape, np.int64)  # the move before that
    for i, j in np.ndindex(grid + 1, grid + 1):
        for m, (a, b) in enumerate(MOVES):
            row, column = i - a, j - b
            if row < 0 or column < 0:
                continue
            if row == column == 0:
                best[i, j, m], before[i, j, m] = costs[m][0, 0], m
                continue
            arrivals = best[row, column] + bend * (np.arange(len(MOVES)) != m)
            before[i, j, m] = arrivals.argmin()
            best[i, j, m] = costs[m][row, column] + arrivals.min()
    point, move = (grid, grid), int(best[grid, grid].argmin())
    cost, points = float(best[grid, grid, move]), [point]
    while point != (0, 0):
        previous = int(before[point][move])
        point, move = (point[0] - MOVES[move][0], point[1] - MOVES[move][1]), previous
        points.append(point)
    return Path(tuple(reversed(points)), cost)


def loss_along(errors: np.ndarray, schedule: Schedule, points: int = 256) -> float:
    """Integrate Σ_k e_k dτ_k along a schedule of two streams, with this number of midpoints between knots."""
    grid, total = errors.shape[1] - 1, 0.0
    for segment, (low, high) in enumerate(schedule.segments):
        u = low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
        time, rate = (values.numpy() for values in schedule.at(u, segment))
        corner = np.minimum((time * grid).astype(np.int64), grid - 1)
        (i, j), (x, y) = corner.T, (time * grid - corner).T
        near = errors[:, i, j] * (1 - x) + errors[:, i + 1, j] * x  # (2, points)
        far = errors[:, i, j + 1] * (1 - x) + errors[:, i + 1, j + 1] * x
        total += (high - low) * float(((near * (1 - y) + far * y) * rate.T).sum(0).mean())
    return total


def as_schedule(path: Path, streams: Sequence[str]) -> dict[str, Any]:
    """Write a path as the options of the schedule `learned`, with whole numbers of grid intervals.

    Base time is length in the maximum norm; moves in one direction become one interval.
    """
    runs: list[list[int]] = []
    for move in np.diff(path.points, axis=0).tolist():
        if runs and runs[-1][0] * move[1] == runs[-1][1] * move[0]:
            runs[-1] = [runs[-1][0] + move[0], runs[-1][1] + move[1]]
        else:
            runs.append(move)
    increments = {name: [run[k] for run in runs] for k, name in enumerate(streams)}
    return {"name": "learned", "increments": increments, "base": [max(run) for run in runs]}
