"""What a schedule is: one monotone map τ_k from base time u to each stream's time, its rate τ_k′ and its knots.

Training noises stream k at τ_k(u), the network is told τ_k(u), sampling integrates dx_k/du = τ_k′(u)·v_k and never
steps across a knot: all of it is read from here, so no other place knows which stream leads, or by how much.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfd.utils.errors import SFDError

TOLERANCE = 1e-9  # how far rounding may take a hand-written map from 0, from 1 and from monotone
ROUNDING = 1 + 1e-15  # u this close below a knot is on it: a step that is meant to start there has the rate after it


class StreamTimes(NamedTuple):
    """Where each stream is at a base time, and how fast it moves. K streams, in the order of `Schedule.streams`."""

    time: Tensor  # (…, K), τ_k(u) in [0, 1]; 0 is noise, 1 is data
    rate: Tensor  # (…, K), τ_k′(u) ≥ 0


class Schedule(ABC):
    """Maps base time u in [0, 1] to every stream's time, τ_k(0) = 0, τ_k(1) = 1, monotone.

    A subclass implements `at`, and overrides `knots` if its rates jump anywhere.
    """

    def __init__(self, streams: Sequence[str]) -> None:
        """Name the streams, in the order of the last dimension of all times and rates."""
        self.streams: tuple[str, ...] = tuple(streams)
        self.spec: dict[str, Any] = {}  # name and settings, as `build_schedule` takes them; filled in there

    @property
    def knots(self) -> tuple[float, ...]:
        """Interior base times where some rate jumps, ascending; none for a smooth map."""
        return ()

    @property
    def segments(self) -> tuple[tuple[float, float], ...]:
        """The intervals between knots, which cover [0, 1]; within each one every τ_k is smooth."""
        return tuple(pairwise((0.0, *self.knots, 1.0)))

    @abstractmethod
    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        """Look up times and rates.

        Args:
            u: base times (…), floating point, in [0, 1].
            segment: evaluate with the piece of this segment, which gives one-sided limits at its ends (a solver that
                stops at a knot needs the rate before it). None: the piece that u lies in, at a knot the later one.

        Returns:
            times and rates (…, K), in u's dtype and on its device.
        """

    def inverse(self, stream: int, time: float, segment: int) -> float:
        """Find where in a segment a stream's time has first reached `time`; a stream may rest there for a while.

        Args:
            stream: its place in `streams`.
            time: stream time in [0, 1].
            segment: which.

        Returns:
            the first base time of the segment, of float64's, with τ(u) ≥ time; its end if there is none.
        """
        low, high = self.segments[segment]
        while True:  # 64 parts at a time, until no number lies between
            u = np.linspace(low, high, 65)
            reached = (self.at(torch.from_numpy(u), segment).time[:, stream] >= time).tolist()
            first = reached.index(True) if any(reached) else len(u) - 1
            if (u[first - 1], u[first]) == (low, high) or first == 0:
                return float(u[first])
            low, high = float(u[first - 1]), float(u[first])


class PiecewiseLinear(Schedule):
    """A schedule that is linear between given points; a knot wherever the slope of any stream changes."""

    def __init__(self, base: Sequence[float], times: Mapping[str, Sequence[float]]) -> None:
        """Join points with straight lines.

        Args:
            base: base times of the points, strictly ascending, the first 0 and the last 1.
            times: per stream, in stream order, its time at each of those points: ascending from 0 to 1.
        """
        super().__init__(tuple(times))
        u, tau = np.asarray(base, np.float64), np.array([times[name] for name in times], np.float64).T
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
        """Look up times and rates; see `Schedule.at`."""
        exact = u.double()  # knots may lie closer together than float32 can tell
        base, times, rates = (table.to(u.device) for table in (self._base, self._times, self._rates))
        if segment is None:
            piece: Tensor | int = torch.searchsorted(base[1:-1].contiguous(), exact.contiguous() * ROUNDING, right=True)
        else:
            piece = segment
        fraction = ((exact - base[piece]) / (base[piece + 1] - base[piece])).clamp(0, 1)
        # lerp hits both ends exactly, so a finished stream is at 1 and not at 1 − 1e-16.
        time = torch.lerp(times[piece], times[piece + 1], fraction[..., None])
        return StreamTimes(time.to(u.dtype), rates[piece].expand(time.shape).to(u.dtype))


def check(schedule: Schedule, label: str) -> None:
    """Verify what sampling and training rely on, on a grid over every segment.

    Raises:
        SFDError: knots out of order or outside (0, 1); τ(0) ≠ 0 or τ(1) ≠ 1; τ falls; a rate is negative or not finite.
    """
    knots = schedule.knots
    if any(not 0 < k < 1 for k in knots) or any(b <= a for a, b in pairwise(knots)):
        raise SFDError(f"{label}: knots must ascend strictly inside (0, 1), got {knots}")
    grid = torch.linspace(0, 1, 65, dtype=torch.float64)
    pieces = [schedule.at(low + (high - low) * grid, j) for j, (low, high) in enumerate(schedule.segments)]
    time, rate = torch.cat([p.time for p in pieces]), torch.cat([p.rate for p in pieces])
    expected = (len(grid) * len(pieces), len(schedule.streams))
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
