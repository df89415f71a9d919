"""Where a solver stops, and where it steps between stops.

The right-hand side τ_k′(u)·v_k jumps where a rate τ_k′ does, at the schedule's knots, and where the velocity v itself
does, as a guided one at the ends of its interval. A step across a jump costs any solver its order, so [0, 1] is
divided there into pieces, each integrated by itself and smooth up to both ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sfd.schedules import Schedule
from sfd.solvers import Solver, check_steps
from sfd.utils.errors import SFDError, unknown

BUDGETS = ("length", "equal", "time")
Budget = str | Sequence[float]
"""How steps are divided over segments: one of `BUDGETS`, or a weight a segment."""

Jumps = Sequence[Sequence[float]]
"""Stream times at which a velocity jumps: for each stream, in packed order, any number of them."""

LEAST_SHIFT, MOST_SHIFT = 0.01, 100.0  # beyond, steps all but coincide at one end of time

SLIVER = 1e-9  # stops between which no stream's time moves by more than this are one, rounded apart


@runtime_checkable
class PiecewiseVelocity(Protocol):
    """A velocity field that is smooth but for jumps, and is told between which of them it is evaluated."""

    @property
    def jumps(self) -> Jumps:
        """Where it jumps."""

    def begin(self, moving: Sequence[bool], middle: Sequence[float] | None = None) -> None:
        """Enter a piece; all calls until the next `begin` belong to it, and at its ends want the limit from inside.

        Args:
            moving: per stream, whether it moves in the piece; the velocity of the others does not matter.
            middle: per stream, the time halfway between those at the piece's ends, so off any jump for one that moves;
                None: it is integrated blind to the jumps, so the time of each call decides.
        """

    def __call__(self, x: Tensor, times: Tensor, /) -> Tensor:
        """Evaluate it; see `sfd.guidance.VelocityField`."""


class Piece(NamedTuple):
    """A part of [0, 1] that a solver integrates by itself."""

    segment: int | None  # the schedule's segment that it lies in; None: all of [0, 1], with right-continuous rates
    start: float
    end: float
    moving: tuple[bool, ...]  # per stream
    middle: tuple[float, ...] | None  # per stream, halfway between its times at both ends; None: of no meaning


def whole(schedule: Schedule) -> list[Piece]:
    """All of [0, 1] as one piece, blind to knots and jumps."""
    return [Piece(None, 0.0, 1.0, (True,) * len(schedule.streams), None)]


def pieces(schedule: Schedule, jumps: Jumps | None = None) -> list[Piece]:
    """Divide the segments in which a stream moves at the base times where one of them reaches a jump."""
    found = []
    for j, (start, end) in enumerate(schedule.segments):
        first, last = _times(schedule, j, start, end).tolist()
        # Monotone times that agree at both ends have stood still between.
        moving = tuple(b > a for a, b in zip(first, last, strict=True))
        if not any(moving):
            continue
        reached = [
            schedule.inverse(k, time, j)
            for k, times in enumerate(jumps or ())
            for time in times
            if first[k] < time < last[k]
        ]
        stops = [start]
        for u in sorted(reached):
            if _far(schedule, j, stops[-1], u) and _far(schedule, j, u, end):
                stops.append(u)
        for a, b in pairwise((*stops, end)):
            middle = _times(schedule, j, a, b).mean(dim=0)
            found.append(Piece(j, a, b, moving, tuple(middle.tolist())))
    return found


def _times(schedule: Schedule, segment: int | None, *base: float) -> Tensor:
    """Look up stream times at base times of a segment: (len(base), K)."""
    return schedule.at(torch.tensor(base, dtype=torch.float64), segment).time


def _far(schedule: Schedule, segment: int, a: float, b: float) -> bool:
    before, after = _times(schedule, segment, a, b)
    return bool(((after - before) > SLIVER).any())


def grids(
    method: Solver,
    name: str,
    schedule: Schedule,
    parts: Sequence[Piece],
    steps: int | None,
    shift: float,
    budget: Budget,
    jumps: Jumps | None = None,
) -> list[list[float]]:
    """Place each piece's points: its ends, and the steps between if the solver does not choose them itself.

    Raises:
        SFDError: solver, steps, shift and budget do not fit the pieces or each other.
    """
    if not LEAST_SHIFT <= shift <= MOST_SHIFT:
        raise SFDError(f"the time shift must be from {LEAST_SHIFT:g} to {MOST_SHIFT:g} (1: none), got {shift}")
    check_steps(method, name, steps, len(parts), _stops(schedule, jumps))
    if steps is None:
        if shift != 1:
            raise SFDError(f"solver {name!r} chooses its own steps, so a time shift does nothing; leave it out")
        if budget != "length":
            raise SFDError(f"solver {name!r} chooses its own steps, so a budget of steps does nothing; leave it out")
        return [[p.start, p.end] for p in parts]
    # Steps are even in w, where u = s·w / (1 + (s − 1)·w); the inverse carries stops there, so they are still hit.
    ends = [(p.start / (shift + (1 - shift) * p.start), p.end / (shift + (1 - shift) * p.end)) for p in parts]
    counts = split_steps(steps, _shares(budget, schedule, parts, [b - a for a, b in ends]))
    placed = []
    for piece, (low, high), count in zip(parts, ends, counts, strict=True):
        w = np.linspace(low, high, count + 1)
        u = shift * w / (1 + (shift - 1) * w)
        placed.append([piece.start, *u[1:-1].tolist(), piece.end])
    return placed


def _stops(schedule: Schedule, jumps: Jumps | None) -> str:
    """Name what ends a piece, for a message."""
    named = []
    if schedule.knots:
        named.append(f"the schedule's knots (u = {', '.join(f'{u:.4g}' for u in schedule.knots)})")
    streams = [
        f"{name} at {' and '.join(f'{t:g}' for t in times)}"
        for name, times in zip(schedule.streams, jumps or [()] * len(schedule.streams), strict=True)
        if times
    ]
    if streams:
        named.append(f"the velocity's jumps, such as the ends of a guidance interval ({', '.join(streams)})")
    return " and ".join(named)


def split_steps(steps: int, lengths: Sequence[float]) -> list[int]:
    """Divide steps in proportion to lengths by largest remainder, at least one each. Needs steps ≥ len(lengths)."""
    total = math.fsum(lengths)
    quotas = [steps * length / total for length in lengths]
    counts = [max(1, math.floor(q)) for q in quotas]
    while sum(counts) < steps:
        counts[int(np.argmax(np.subtract(quotas, counts)))] += 1
    while sum(counts) > steps:  # the ones raised to 1 are paid for by whoever has the most above its quota
        excess = [c - q if c > 1 else -math.inf for c, q in zip(counts, quotas, strict=True)]
        counts[int(np.argmax(excess))] -= 1
    return counts


def _shares(budget: Budget, schedule: Schedule, parts: Sequence[Piece], lengths: Sequence[float]) -> Sequence[float]:
    """Weigh the pieces: a budget's rule weighs segments, whose pieces share by length."""
    if budget == "length":
        return lengths
    segments = list(dict.fromkeys(p.segment for p in parts))
    weights = dict(zip(segments, _weights(budget, schedule, segments), strict=True))
    totals = {s: math.fsum(n for p, n in zip(parts, lengths, strict=True) if p.segment == s) for s in segments}
    return [weights[p.segment] * (length / totals[p.segment]) for p, length in zip(parts, lengths, strict=True)]


def _weights(budget: Budget, schedule: Schedule, segments: Sequence[int | None]) -> Sequence[float]:
    """Weigh the segments by a budget's rule."""
    if budget == "equal":
        return [1.0] * len(segments)
    if budget == "time":
        ends = [(0.0, 1.0) if s is None else schedule.segments[s] for s in segments]
        travelled = [_times(schedule, s, *e).diff(dim=0).sum() for s, e in zip(segments, ends, strict=True)]
        return [float(time) for time in travelled]
    if isinstance(budget, str):
        raise unknown("budget", budget, BUDGETS)
    if len(budget) != len(segments) or not all(math.isfinite(w) and w > 0 for w in budget):
        raise SFDError(
            f"a budget of weights needs one greater than 0 for each of the {len(segments)} segments in which a stream "
            f"moves, got {list(budget)}"
        )
    return budget
