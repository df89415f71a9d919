"""The schedule: base time u ∈ [0, 1] → each stream's time τ_k(u), its rate τ_k′(u), and the knots where a rate jumps.

Training noises stream k at τ_k(u), the network receives τ_k(u), sampling integrates dx_k/du = τ_k′(u)·v_k and never
steps across a knot. All of it is read from here, so no other place knows which stream leads, or by how much.

A schedule is a function of the streams' names and of keyword options, registered by name in `SCHEDULES`:

    offset        leaders τ(u) = min(1, (1 + Δ)·u), followers τ(u) = max(0, (1 + Δ)·u − Δ): the method (Δ = 0.3)
    synchronous   τ(u) = u for all streams: the offset schedule at Δ = 0
    sequential    leaders first, then followers: the offset schedule at Δ = 1
    table         straight lines between given points
    learned       straight lines given by their increments, monotone by construction
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd.utils.config import options_record, parse
from sfd.utils.errors import SFDError, unknown

TOLERANCE = 1e-9  # allowed rounding of a hand-written map: off 0, off 1, off monotone
ROUNDING = 1 + 1e-15  # u this close below a knot is on it: a step that starts there has the rate after it
MIN_SPACING = 1e-9  # points of a table closer than this in base time would be a jump


class StreamTimes(NamedTuple):
    """Time and rate of each of K streams, in the order of `Schedule.streams`."""

    time: Tensor  # (…, K), τ_k(u) in [0, 1]; 0 is noise, 1 is data
    rate: Tensor  # (…, K), τ_k′(u) ≥ 0


class Schedule(ABC):
    """Maps base time to every stream's time; τ_k(0) = 0, τ_k(1) = 1, monotone.

    A subclass implements `at`, and overrides `knots` if a rate jumps anywhere.
    """

    def __init__(self, streams: Sequence[str]) -> None:
        """Name the streams, in the order of the last dimension of all times and rates."""
        self.streams: tuple[str, ...] = tuple(streams)
        self.spec: dict[str, Any] = {}  # name and options, filled in by `build_schedule`, which takes them again

    @property
    def knots(self) -> tuple[float, ...]:
        """Interior base times where some rate jumps, ascending; none for a smooth map."""
        return ()

    @property
    def segments(self) -> tuple[tuple[float, float], ...]:
        """The intervals between knots, which cover [0, 1]; every τ_k is smooth within each."""
        return tuple(pairwise((0.0, *self.knots, 1.0)))

    @abstractmethod
    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        """Look up times and rates.

        Args:
            u: base times (…), floating point, in [0, 1].
            segment: index of the segment whose one-sided limits are wanted at a knot (a solver that stops there needs
                the rate before it). None: the segment that u lies in, at a knot the later one.

        Returns:
            times and rates (…, K), in u's dtype and on its device.
        """

    def first_time(self, stream: int, time: float, segment: int) -> float:
        """First base time of a segment at which a stream has reached `time`, exact in float64; its end if none.

        Args:
            stream: index into `streams`; the stream may rest in a part of the segment.
            time: stream time in [0, 1].
            segment: index into `segments`.
        """

        def reached(u: float) -> bool:
            return bool(self.at(torch.tensor(u, dtype=torch.float64), segment).time[stream] >= time)

        low, high = self.segments[segment]
        if reached(low):
            return low
        while low < (middle := (low + high) / 2) < high:
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high


class PiecewiseLinear(Schedule):
    """Straight lines between given points; a knot wherever the slope of any stream changes."""

    def __init__(self, base: Sequence[float], times: Mapping[str, Sequence[float]]) -> None:
        """Store the points.

        Args:
            base: P base times, strictly ascending from 0 to 1.
            times: per stream, in stream order, its P times there, ascending from 0 to 1.
        """
        super().__init__(tuple(times))
        u, tau = np.asarray(base, np.float64), np.array(list(times.values()), np.float64).T
        slopes = np.diff(tau, axis=0) / np.diff(u)[:, None]
        # Points on a straight line are no knots: Δ = 0 must be the synchronous schedule itself.
        bends = np.abs(np.diff(slopes, axis=0)) > TOLERANCE * np.maximum(slopes[1:], slopes[:-1])
        keep = np.concatenate(([True], bends.any(axis=1), [True]))
        u, tau = u[keep], tau[keep]
        self._base = torch.from_numpy(u)  # (P,)
        self._times = torch.from_numpy(tau)  # (P, K)
        self._rates = torch.from_numpy(np.diff(tau, axis=0) / np.diff(u)[:, None])  # (P − 1, K)

    @property
    def knots(self) -> tuple[float, ...]:
        """Interior base times where some stream's slope changes."""
        return tuple(self._base[1:-1].tolist())

    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        """Look up times and rates; see `Schedule.at`. Computed on the CPU in float64, which not every device knows."""
        exact, base = u.cpu().double(), self._base
        j: Tensor | int | None = segment
        if j is None:
            j = torch.searchsorted(base[1:-1].contiguous(), exact.contiguous() * ROUNDING, right=True)
        fraction = ((exact - base[j]) / (base[j + 1] - base[j])).clamp(0, 1)
        # lerp hits both ends exactly, so a finished stream is at 1 and not at 1 − 1e-16.
        time = torch.lerp(self._times[j], self._times[j + 1], fraction[..., None])
        rate = self._rates[j].expand(time.shape)
        return StreamTimes(time.to(u), rate.to(u))


def offset(
    streams: Sequence[str],
    *,
    delta: Annotated[float, Field(ge=0, le=1e6)] = 0.3,
    leaders: tuple[str, ...] = ("semantic",),
) -> Schedule:
    """Some streams lead, the others follow Δ behind (Pan et al. 2025, arXiv 2512.04926).

    Leaders move alone, then all streams, then followers alone. Beyond Δ = 1 leaders arrive before followers set out.

    Args:
        streams: all streams, in packed order.
        delta: Δ ≥ 0; 0 is synchronous, 1 is sequential.
        leaders: the streams that run ahead; at least one must follow.
    """
    for name in leaders:
        if name not in streams:
            raise unknown("leading stream", name, streams)
    if not 0 < len(set(leaders)) < len(streams):
        raise SFDError(
            f"an offset needs streams that lead and streams that follow, but of {', '.join(streams)} the leaders are "
            f"{', '.join(leaders) or 'none'}; name some, or use the schedule 'synchronous'"
        )
    depart, arrive = delta / (1 + delta), 1 / (1 + delta)  # followers leave 0; leaders reach 1
    # Written out at each point, because (1 + Δ)·u − Δ in floating point misses 0 and 1 by a little.
    lead = {0.0: 0.0, depart: min(1.0, delta), arrive: 1.0, 1.0: 1.0}
    follow = {0.0: 0.0, arrive: max(0.0, 1 - delta), depart: 0.0, 1.0: 1.0}
    base = sorted(lead)
    tables = {name: lead if name in leaders else follow for name in streams}
    return PiecewiseLinear(base, {name: [points[u] for u in base] for name, points in tables.items()})


def synchronous(streams: Sequence[str]) -> Schedule:
    """All streams at one time, τ(u) = u: ordinary flow matching of the composite latent."""
    return PiecewiseLinear((0.0, 1.0), dict.fromkeys(streams, (0.0, 1.0)))


def sequential(streams: Sequence[str], *, leaders: tuple[str, ...] = ("semantic",)) -> Schedule:
    """Leaders go from noise to data, then followers do."""
    return offset(streams, delta=1.0, leaders=leaders)


def table(streams: Sequence[str], *, points: dict[str, tuple[tuple[float, float], ...]]) -> Schedule:
    """Straight lines between points.

    Args:
        streams: all streams, in packed order.
        points: per stream, any number of pairs (base time, stream time), both ascending from (0, 0) to (1, 1).
    """
    for name in points:
        if name not in streams:
            raise unknown("stream", name, streams)
    for name in streams:
        _check_points(name, points.get(name, ()))
    merged = sorted({u for pairs in points.values() for u, _ in pairs})
    # Points of two streams that all but coincide are one: a sliver between them would only cost solver steps.
    base = [0.0, *(b for a, b in pairwise(merged) if b - a >= MIN_SPACING and b < 1), 1.0]
    times = {}
    for name in streams:
        u, time = np.array(points[name]).T
        # Rounding in the interpolation must not make a flat stream fall.
        times[name] = np.maximum.accumulate(np.interp(base, u, time)).clip(0, 1).tolist()
    return PiecewiseLinear(base, times)


def _check_points(name: str, points: Sequence[tuple[float, float]]) -> None:
    if len(points) < 2 or tuple(points[0]) != (0, 0) or tuple(points[-1]) != (1, 1):
        raise SFDError(f"the points of stream {name!r} must begin at (0, 0) and end at (1, 1), got {list(points)}")
    for (u, time), (next_u, next_time) in pairwise(points):
        if not next_u - u >= MIN_SPACING:
            raise SFDError(f"stream {name!r}: base times must ascend by {MIN_SPACING} or more, got {u} then {next_u}")
        if not next_time >= time:
            raise SFDError(f"stream {name!r}: times must not fall, got {time} then {next_time} at base time {next_u}")


def learned(
    streams: Sequence[str],
    *,
    increments: dict[str, tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...]],
    base: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None,
) -> Schedule:
    """Straight lines by their increments, what `sfd learn-schedule` writes: any increments ≥ 0 are a monotone schedule.

    Args:
        streams: all streams, in packed order.
        increments: per stream, how far its time moves in each of P intervals, in any unit: they are divided by their
            sum.
        base: lengths of the intervals in base time, in any unit; None: all alike.
    """
    for name in increments:
        if name not in streams:
            raise unknown("stream", name, streams)
    intervals = len(next(iter(increments.values()), ()))
    rows = {"base": base if base is not None else (1.0,) * intervals}
    rows |= {f"increments of stream {name!r}": increments.get(name, ()) for name in streams}
    for label, row in rows.items():
        if len(row) != intervals or not sum(row) > 0:
            raise SFDError(
                f"{label} must be {max(intervals, 1)} numbers, one for each interval of base time, and not all 0, "
                f"got {list(row)}"
            )
    u, *times = (np.concatenate(([0.0], np.cumsum(row) / np.cumsum(row)[-1])) for row in rows.values())
    if np.diff(u).min() < MIN_SPACING:
        raise SFDError(
            f"base: the shortest interval must be at least {MIN_SPACING} of all of them, got {list(rows['base'])}"
        )
    return PiecewiseLinear(u.tolist(), dict(zip(streams, (row.tolist() for row in times), strict=True)))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "offset": offset,
    "synchronous": synchronous,
    "sequential": sequential,
    "table": table,
    "learned": learned,
}
"""Schedules by name. A new one is a function `(streams, *, options) → Schedule` and an entry here."""


def build_schedule(spec: str | Mapping[str, Any], streams: Sequence[str]) -> Schedule:
    """Build and verify a schedule from plain values, as a recipe or a saved model gives them.

    Args:
        spec: a name, or a name with options: {"name": "offset", "delta": 0.3}.
        streams: names of the streams, in packed order.

    Returns:
        the schedule; its `spec` holds all options, defaults too, and builds an equal one.
    """
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise SFDError(f"a schedule needs a name ({', '.join(SCHEDULES)}), but {options} was given")
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    label = f"schedule {name!r}"
    settings = parse(options_record(SCHEDULES[name]), options, label)
    schedule = SCHEDULES[name](tuple(streams), **dict(settings))
    validate(schedule, label)
    schedule.spec = {"name": name, **settings.model_dump(mode="json")}
    return schedule


def validate(schedule: Schedule, label: str = "schedule") -> None:
    """Verify on a grid over every segment what training and sampling rely on: 0 to 1, monotone, finite rates ≥ 0."""
    knots = schedule.knots
    if any(not 0 < k < 1 for k in knots) or any(b <= a for a, b in pairwise(knots)):
        raise SFDError(f"{label}: knots must ascend strictly inside (0, 1), got {knots}")
    grid = torch.linspace(0, 1, 65, dtype=torch.float64)
    parts = [schedule.at(low + (high - low) * grid, j) for j, (low, high) in enumerate(schedule.segments)]
    time, rate = torch.cat([p.time for p in parts]), torch.cat([p.rate for p in parts])
    expected = (len(grid) * len(parts), len(schedule.streams))
    if time.shape != expected or rate.shape != expected:
        raise SFDError(
            f"{label}: times and rates of {expected[0]} base times must have shape {expected}, "
            f"got {tuple(time.shape)} and {tuple(rate.shape)}"
        )
    for k, name in enumerate(schedule.streams):
        start, end = time[0, k].item(), time[-1, k].item()
        if not (abs(start) <= TOLERANCE and abs(end - 1) <= TOLERANCE):
            raise SFDError(f"{label}: stream {name!r} must run from time 0 to 1, but it runs from {start} to {end}")
        if not bool((time[:, k].diff() >= -TOLERANCE).all()):
            raise SFDError(f"{label}: the time of stream {name!r} must never fall as base time grows")
        if not bool((rate[:, k].isfinite() & (rate[:, k] >= -TOLERANCE)).all()):
            raise SFDError(f"{label}: the rate of stream {name!r} must be finite and at least 0 everywhere")
