"""Sampling: noise by image seed, then dx_k/du = τ_k′(u)·v_k from u = 0 to u = 1, one smooth interval after another.

The right-hand side jumps where a rate τ_k′ does, at the schedule's knots, and where the velocity v does, as a guided
one at the ends of its guidance interval. A step across a jump costs any solver its order, so [0, 1] is divided there.
Each interval is integrated with the one-sided limits at its ends, over the streams that move in it; the others are no
part of the solver's state. The sampler knows nothing of classes, networks or autoencoders: it gets a velocity function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfd.guidance import PiecewiseVelocity, VelocityField
from sfd.latents import CompositeLatent
from sfd.schedule import Schedule, StreamTimes
from sfd.solvers import SOLVERS, History, Solver, add_integral
from sfd.utils import rng
from sfd.utils.config import options_record, parse
from sfd.utils.device import to_device
from sfd.utils.errors import SFDError, unknown

DEFAULT_STEPS = 25
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0  # beyond, steps all but coincide at one end of time
DRAWS_PER_INTERVAL = 2**20  # numbers reserved for the noise of a stochastic solver on one interval
MIN_INTERVAL = 1e-9  # stops between which no stream's time moves by more than this are one, rounded apart


class Progress(NamedTuple):
    """What a callback receives after each step."""

    u: float  # base time that the step arrived at
    t: Tensor  # (K,) stream times there, on the CPU
    x: Tensor  # (B, N) packed state there
    nfe: int  # number of function evaluations so far


class Result(NamedTuple):
    """What `integrate` returns."""

    x: Tensor  # (B, N), the state at u = 1
    nfe: int  # number of function evaluations: calls of the velocity, each for the whole batch


def initial_noise(seeds: Sequence[int], latent: CompositeLatent) -> Tensor:
    """Draw x at u = 0, image k from seeds[k] ≥ 0 alone: (len(seeds), N), float32, on the CPU."""
    for seed in seeds:
        if seed < 0:
            raise SFDError(f"a seed must be a whole number of at least 0, got {seed}")
    return rng.normal(seeds, latent.size, "noise")


def integrate(
    velocity: VelocityField,
    noise: Tensor,
    schedule: Schedule,
    latent: CompositeLatent,
    *,
    solver: str = "multistep",
    steps: int | None = None,
    options: Mapping[str, Any] | None = None,
    shift: float = 1.0,
    seeds: Sequence[int] | None = None,
    knots: bool = True,
    callback: Callable[[Progress], None] | None = None,
) -> Result:
    """Carry noise to data.

    Args:
        velocity: v(x, t) with x (B, N) packed and t (K,) on the CPU in x's dtype; returns (B, N).
        noise: (B, N), the state at u = 0; not written to.
        schedule: times and rates of the latent's streams.
        latent: the streams.
        solver: a name in `SOLVERS`.
        steps: total number, at least one per smooth interval; None: 25. Adaptive solvers choose their own.
        options: of the solver, such as rtol.
        shift: a in [0.01, 100] maps an even grid q of steps to u = a·q / (1 + (a − 1)·q); 1 keeps it even, less than 1
            puts more steps near noise. Without effect on adaptive solvers.
        seeds: one per image, for the noise of a stochastic solver.
        knots: stop at knots and discontinuities. False integrates [0, 1] as one interval, as the published sampler
            does, with the rate after a knot and the guidance of each evaluated time. Only for comparison.
        callback: called after each step.
    """
    _check_shapes(noise, schedule, latent, seeds)
    method, settings = find_solver(solver, options)
    jumps = velocity.discontinuities if isinstance(velocity, PiecewiseVelocity) else ()
    intervals = smooth_intervals(schedule, jumps) if knots else [undivided(schedule)]
    grids = time_grids(intervals, method, steps, shift)
    x, nfe = noise, 0
    before: ActiveODE | None = None  # for a multistep method, where streams are independent
    joins = method.joined and not (isinstance(velocity, PiecewiseVelocity) and not velocity.independent)
    for interval, grid in zip(intervals, grids, strict=True):
        ode = ActiveODE(velocity, x, schedule, latent, interval, seeds, nfe, before)
        arguments = [ode, ode.state(x), grid, ode.reporter(callback)]
        if method.stochastic:
            arguments.append(ode.churn)
        if method.joined:
            arguments.append(ode)
        x = ode.packed(method.solve(*arguments, **settings))
        nfe, before = ode.nfe, ode if joins else None
    return Result(x, nfe)


class ActiveODE:
    """dx/du = τ_k′(u)·v_k(x, τ(u)) on one smooth interval, for the M entries of the streams that move in it."""

    def __init__(
        self,
        velocity: VelocityField,
        x: Tensor,
        schedule: Schedule,
        latent: CompositeLatent,
        interval: SmoothInterval,
        seeds: Sequence[int] | None,
        nfe: int,
        before: ActiveODE | None = None,
    ) -> None:
        """Start from x (B, N) at the interval's start, after `nfe` function evaluations and the interval `before`."""
        self._before = before
        self._left: tuple[Tensor, History] | None = None  # the last step of a multistep method
        if isinstance(velocity, PiecewiseVelocity) and interval.midpoint is not None:
            velocity = velocity.on_interval(interval.active, interval.midpoint)
        self._velocity, self._x, self._schedule, self._interval = velocity, x, schedule, interval
        self._latent, self._seeds, self._draws = latent, seeds, interval.number * DRAWS_PER_INTERVAL
        self._active = [k for k, active in enumerate(interval.active) if active]  # indices of the streams that move
        self.nfe = nfe

    def state(self, packed: Tensor) -> Tensor:
        """Take the active streams out of a packed latent: (B, M) of (B, N)."""
        return torch.cat(self._active_parts(packed), dim=1)

    def packed(self, state: Tensor) -> Tensor:
        """Put the active streams (B, M) back among those at rest: (B, N)."""
        parts = list(self._x.split(self._latent.sizes, dim=1))
        for k, part in zip(self._active, self._parts(state), strict=True):
            parts[k] = part
        return torch.cat(parts, dim=1)

    def __call__(self, u: float, state: Tensor) -> Tensor:
        """Evaluate dx/du, (B, M), at a base time and the state (B, M) there."""
        self.nfe += 1
        t, rate = self._at(u)
        v = self._velocity(self.packed(state), t.to(state.dtype)).to(state.dtype)
        rates = rate.tolist()  # numbers: expanded rates would have to be copied to the device at each evaluation
        return torch.cat([rates[k] * v_k for k, v_k in zip(self._active, self._active_parts(v), strict=True)], dim=1)

    def churn(self, state: Tensor, u: float, earlier: float) -> Tensor:
        """Lead streams back to times t̂ ≤ t: x ← t̂/t·x + √((1 − t̂)² − (t̂/t·(1 − t))²)·ξ, ξ ~ N(0, 1)."""
        if self._seeds is None:
            raise SFDError("this solver draws noise, but has no seeds; give integrate one seed per image")
        noise = rng.normal(self._seeds, self._latent.size, "renoise", self._interval.segment or 0, self._draws)
        self._draws += 1
        times, times_back = (self._at(base).time.tolist() for base in (u, earlier))
        parts = []
        for k, x, xi in zip(self._active, self._parts(state), self._active_parts(noise), strict=True):
            t, t_back = times[k], times_back[k]
            kept = t_back / t if t > 0 else 1.0  # a stream that is still pure noise stays as it is
            spread = math.sqrt(max(0.0, (1 - t_back) ** 2 - (kept * (1 - t)) ** 2))
            parts.append(kept * x + spread * to_device(xi.to(x.dtype), x.device))
        return torch.cat(parts, dim=1)

    def leave(self, start: Tensor, history: History) -> None:
        """Keep the last step of a multistep method: see `solvers.Seam`."""
        self._left = start, history

    def correct(self, x: Tensor, u: float, f: Tensor, order: int) -> Tensor:
        """Correct the last step of the interval before, for streams that move on: see `solvers.Seam`.

        Their velocity is continuous at a knot, so f there, from before, is the same velocity at the rate before.
        """
        before, self._before = self._before, None
        if before is None or before._left is None:
            return x
        (start, history), end = before._left, before._interval.end
        rates, rates_before = self._at(u).rate.tolist(), before._at(end).rate.tolist()
        parts, values = list(self._parts(x)), self._parts(f)
        for place, k in enumerate(self._active):
            if self._interval.joined[k] and rates[k] > 0:
                there = before._active.index(k)
                nodes = [(node, before._parts(value)[there]) for node, value in history]
                nodes.append((end, rates_before[k] / rates[k] * values[place]))
                parts[place] = add_integral(before._parts(start)[there], nodes[-order:], history[-1][0], end)
        return torch.cat(parts, dim=1)

    def reporter(self, callback: Callable[[Progress], None] | None) -> Callable[[float, Tensor], None] | None:
        """Make a solver's callback of one for `Progress`."""
        if callback is None:
            return None
        return lambda u, state: callback(Progress(u, self._at(u).time.to(state.dtype), self.packed(state), self.nfe))

    def _at(self, u: float) -> StreamTimes:
        # An adaptive solver may probe beyond the interval. In float32 a base time could round across a knot.
        inside = min(max(u, self._interval.start), self._interval.end)
        return self._schedule.at(torch.tensor(inside, dtype=torch.float64), self._interval.segment)

    def _active_parts(self, packed: Tensor) -> list[Tensor]:
        """Active streams of a packed latent (B, N), one tensor each."""
        parts = packed.split(self._latent.sizes, dim=1)
        return [parts[k] for k in self._active]

    def _parts(self, state: Tensor) -> Sequence[Tensor]:
        """Active streams of a state (B, M), one tensor each."""
        return state.split([self._latent.sizes[k] for k in self._active], dim=1)


class SmoothInterval(NamedTuple):
    """A part of [0, 1] in which rates and velocity are smooth, so that a solver may step freely."""

    segment: int | None  # of the schedule; None: all of [0, 1], with the rate after each knot
    start: float
    end: float
    active: tuple[bool, ...]  # per stream: whether it moves
    midpoint: tuple[float, ...] | None  # per stream: a time off any discontinuity, halfway between those at the ends
    number: int = 0  # its place in the segment
    joined: tuple[bool, ...] = ()  # per stream: moving, with a continuous velocity, since the interval before


def undivided(schedule: Schedule) -> SmoothInterval:
    """All of [0, 1] as one interval, blind to knots and discontinuities."""
    return SmoothInterval(None, 0.0, 1.0, (True,) * len(schedule.streams), None)


def smooth_intervals(schedule: Schedule, jumps: Sequence[Sequence[float]] = ()) -> list[SmoothInterval]:
    """Divide the segments in which a stream moves where one of them reaches a discontinuity.

    Args:
        schedule: its knots end segments.
        jumps: for each stream, the stream times of the velocity's discontinuities.
    """
    found: list[SmoothInterval] = []
    for j, (start, end) in enumerate(schedule.segments):
        first, last = _times(schedule, j, start, end).tolist()
        # Monotone times that agree at both ends have been at rest between.
        active = tuple(b > a for a, b in zip(first, last, strict=True))
        if not any(active):
            continue
        reached = [
            schedule.first_time(k, t, j) for k, times in enumerate(jumps) for t in times if first[k] < t < last[k]
        ]
        stops = [start]
        for u in sorted(reached):
            if _distinct(schedule, j, stops[-1], u) and _distinct(schedule, j, u, end):
                stops.append(u)
        for number, (a, b) in enumerate(pairwise((*stops, end))):
            midpoint = tuple(_times(schedule, j, a, b).mean(dim=0).tolist())
            joined = _joined(found[-1], active, midpoint, jumps) if found else (False,) * len(active)
            found.append(SmoothInterval(j, a, b, active, midpoint, number, joined))
    return found


def _joined(
    before: SmoothInterval, active: tuple[bool, ...], midpoint: tuple[float, ...], jumps: Sequence[Sequence[float]]
) -> tuple[bool, ...]:
    """Per stream: whether it moves in two neighbouring intervals with no discontinuity between their midpoints."""
    assert before.midpoint is not None
    smooth = [True] * len(active)
    for k, times in enumerate(jumps):
        smooth[k] = not any(before.midpoint[k] < t < midpoint[k] for t in times)
    return tuple(a and b and c for a, b, c in zip(before.active, active, smooth, strict=True))


def _times(schedule: Schedule, segment: int, *base: float) -> Tensor:
    """Stream times at base times of a segment: (len(base), K)."""
    return schedule.at(torch.tensor(base, dtype=torch.float64), segment).time


def _distinct(schedule: Schedule, segment: int, a: float, b: float) -> bool:
    before, after = _times(schedule, segment, a, b)
    return bool(((after - before) > MIN_INTERVAL).any())


def time_grids(
    intervals: Sequence[SmoothInterval], solver: Solver, steps: int | None = None, shift: float = 1.0
) -> list[list[float]]:
    """Place each interval's steps: base times, both ends included; the ends alone for an adaptive solver.

    Args:
        intervals: they share the steps in proportion to their shifted length.
        solver: an entry of `SOLVERS`.
        steps, shift: see `integrate`.
    """
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise SFDError(f"the time shift must be from {MIN_SHIFT:g} to {MAX_SHIFT:g} (1: none), got {shift}")
    if solver.adaptive:
        return [[i.start, i.end] for i in intervals]
    steps = DEFAULT_STEPS if steps is None else steps
    if steps < len(intervals):
        stops = ", ".join(f"{i.end:.4g}" for i in intervals)
        raise SFDError(
            f"steps must end where rates or guidance jump (u = {stops}), so at least {len(intervals)} are needed, "
            f"but {steps} were given"
        )
    # Steps are even in q, where u = a·q / (1 + (a − 1)·q); the inverse carries stops there, so they are still hit.
    ends = [[u / (shift + (1 - shift) * u) for u in (i.start, i.end)] for i in intervals]
    counts = split_steps(steps, [b - a for a, b in ends])
    grids = []
    for interval, (low, high), count in zip(intervals, ends, counts, strict=True):
        q = np.linspace(low, high, count + 1)[1:-1]
        grids.append([interval.start, *(shift * q / (1 + (shift - 1) * q)).tolist(), interval.end])
    return grids


def split_steps(steps: int, lengths: Sequence[float]) -> list[int]:
    """Divide steps in proportion to lengths by largest remainder, at least one each; steps ≥ len(lengths)."""
    total = math.fsum(lengths)
    quotas = [steps * length / total for length in lengths]
    counts = [max(1, math.floor(q)) for q in quotas]
    while sum(counts) < steps:
        counts[int(np.argmax(np.subtract(quotas, counts)))] += 1
    while sum(counts) > steps:  # those raised to 1 take from whoever has the most above its quota
        excess = [c - q if c > 1 else -math.inf for c, q in zip(counts, quotas, strict=True)]
        counts[int(np.argmax(excess))] -= 1
    return counts


def find_solver(name: str, options: Mapping[str, Any] | None = None) -> tuple[Solver, dict[str, Any]]:
    """Look a solver up and check its options; those left out have their defaults."""
    if name not in SOLVERS:
        raise unknown("solver", name, SOLVERS)
    record = options_record(SOLVERS[name].solve)
    for option in sorted((options or {}).keys() - record.model_fields.keys()):
        owners = [each for each, other in SOLVERS.items() if option in options_record(other.solve).model_fields]
        if owners:
            own = ", ".join(record.model_fields) or "none"
            raise SFDError(
                f"{option!r} is an option of solver {owners[0]}, but the solver is {name} (its options: {own}); where "
                f"the solver is changed, change its options too: sample.options={{}} (in `sfd sample`: options={{}})"
            )
    return SOLVERS[name], dict(parse(record, options or {}, f"solver {name!r}"))


def _check_shapes(noise: Tensor, schedule: Schedule, latent: CompositeLatent, seeds: Sequence[int] | None) -> None:
    if schedule.streams != latent.names:
        raise SFDError(
            f"the schedule drives streams {', '.join(schedule.streams)}, but the latent has "
            f"{', '.join(latent.names)}; build the schedule with the names of the latent, in its order"
        )
    if noise.dim() != 2 or noise.shape[1] != latent.size:
        raise SFDError(f"noise must have shape (images, {latent.size}), got {tuple(noise.shape)}")
    if seeds is not None and len(seeds) != len(noise):
        raise SFDError(f"{len(seeds)} seeds were given for noise of {len(noise)} images; give one seed per image")
