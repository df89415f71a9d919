"""Sampling: noise by image seed, then dx_k/du = τ_k′(u)·v_k from u = 0 to u = 1, one segment after another.

The rates τ_k′ jump at the schedule's knots. A step across a jump costs any solver its order, so each segment between
knots is integrated by itself, with one-sided rates at its ends, over the streams that move in it; the others are not
part of its state. The sampler knows nothing of classes, networks or autoencoders: it gets a velocity function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sfd import randomness
from sfd.errors import SFDError, unknown
from sfd.guidance import Guided, VelocityField
from sfd.schedules import Schedule
from sfd.solvers import Solver, check_steps, load_solver
from sfd.streams import Composite

BUDGETS = ("length", "equal", "time")
Budget = str | Sequence[float]
"""How steps are divided over segments: one of `BUDGETS`, or a weight a segment."""


class Progress(NamedTuple):
    """What a callback learns after each step."""

    u: float  # base time that the step arrived at
    times: Tensor  # (K,) stream times there, on the CPU
    x: Tensor  # (B, N) packed state there
    evaluations: int  # velocity evaluations so far


class Result(NamedTuple):
    """What integration returns."""

    x: Tensor  # (B, N) packed samples
    evaluations: int  # velocity evaluations spent: calls, each of the whole batch
    image_evaluations: Tensor  # (B,), int64: those while the image had not arrived yet; fewer with `control: image`


def initial_noise(seeds: Sequence[int], composite: Composite) -> Tensor:
    """Draw where sampling starts, image k from seeds[k] alone: (len(seeds), N), float32, on the CPU.

    Raises:
        SFDError: a negative seed.
    """
    check_seeds(seeds)
    return randomness.normal(seeds, composite.size, "noise")


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse negative seeds.

    Raises:
        SFDError: names the first.
    """
    for seed in seeds:
        if seed < 0:
            raise SFDError(f"a seed must be a whole number of at least 0, got {seed}")


def check_plan(
    schedule: Schedule,
    solver: str,
    steps: int | None,
    options: Mapping[str, Any] | None,
    shift: float,
    budget: Budget = "length",
) -> None:
    """Check what `integrate` would check, before there is anything to integrate.

    Raises:
        SFDError: solver, options, steps, shift and budget do not fit the schedule or each other.
    """
    method, _ = load_solver(solver, options)
    _grids(method, solver, schedule, _moving_segments(schedule), steps, shift, budget)


def integrate(
    velocity: VelocityField,
    noise: Tensor,
    schedule: Schedule,
    composite: Composite,
    *,
    solver: str = "multistep",
    steps: int | None = None,
    options: Mapping[str, Any] | None = None,
    shift: float = 1.0,
    budget: Budget = "length",
    seeds: Sequence[int] | None = None,
    knots: bool = True,
    callback: Callable[[Progress], None] | None = None,
) -> Result:
    """Carry noise to data.

    Args:
        velocity: v(x, times) with x (B, N) packed and times (K,) on the CPU in x's dtype; returns (B, N).
        noise: (B, N), the state at u = 0; not written to.
        schedule: times and rates of the composite's streams.
        composite: the streams.
        solver: name of a module in `sfd.solvers`.
        steps: how many in all, at least one a segment; None for adaptive solvers.
        options: settings of the solver.
        shift: s > 0 maps an even grid w of steps to u = s·w / (1 + (s − 1)·w); 1 keeps it even, less than 1 puts more
            steps near noise. Adaptive solvers take no shift.
        budget: how steps are divided over the segments in which something moves: in proportion to their length in w
            ("length"), evenly ("equal"), in proportion to the stream time that all streams together travel in them
            ("time"), or to given weights, one a segment. Adaptive solvers take none but the default.
        seeds: of the images, from which a stochastic solver draws its noise; others need none.
        knots: whether to stop at knots. False integrates [0, 1] as one piece, blind to them, as the published sampler
            does: a fixed step has each stream's rates at the points where it evaluates. Only to compare with it.
        callback: called after each step.

    Returns:
        the state at u = 1 and the number of velocity evaluations.

    Raises:
        SFDError: schedule and composite have other streams, noise has another size, seeds another number, or solver,
            steps, options, shift and budget do not fit together.
    """
    _check_shapes(noise, schedule, composite, seeds)
    method, settings = load_solver(solver, options)
    segments = _moving_segments(schedule) if knots else [_Segment(None, 0.0, 1.0, (True,) * len(composite.names))]
    grids = _grids(method, solver, schedule, segments, steps, shift, budget)
    counter = _Counter(velocity, len(noise))
    x = noise
    for segment, points in zip(segments, grids, strict=True):
        if isinstance(velocity, Guided):
            velocity.begin(segment.moving)
        piece = _Piece(counter, x, schedule, composite, segment, seeds)
        report = _report(callback, piece, counter) if callback is not None else None
        x = piece.whole(method.solve(piece, x[:, piece.columns], points, settings, report))
    return Result(x, counter.calls, counter.by_image)


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


class _Segment(NamedTuple):
    number: int | None  # which of the schedule's; None: all of [0, 1], with right-continuous rates
    start: float
    end: float
    moving: tuple[bool, ...]  # per stream


class _Counter:
    """A velocity that counts its calls."""

    def __init__(self, velocity: VelocityField, images: int) -> None:
        self._velocity = velocity
        self.calls = 0
        self.by_image = torch.zeros(images, dtype=torch.int64)

    def __call__(self, x: Tensor, times: Tensor, moving: Tensor | None) -> Tensor:
        self.calls += 1
        self.by_image += 1 if moving is None else moving
        return self._velocity(x, times)


class _Piece:
    """The differential equation of one segment, for the entries of the streams that move in it; a `Velocity`."""

    def __init__(
        self,
        velocity: _Counter,
        x: Tensor,
        schedule: Schedule,
        composite: Composite,
        segment: _Segment,
        seeds: Sequence[int] | None,
    ) -> None:
        self._velocity = velocity
        self._start = x
        self._schedule = schedule
        self._composite = composite
        self._segment = segment
        self._seeds = seeds
        self._draws = 0
        moving = composite.expand(torch.tensor(segment.moving))
        self.columns = moving.nonzero()[:, 0].to(x.device)  # (M,)

    def whole(self, state: Tensor) -> Tensor:
        """Put moving entries (B, M) among the resting ones: (B, N)."""
        return self._start.index_copy(1, self.columns, state)

    def times_and_rates(self, u: float | Tensor) -> tuple[Tensor, Tensor]:
        """Look up stream times and rates at u, with this segment's one-sided limits; on the CPU, in x's dtype.

        (K,) each, or (B, K) at base times (B,).
        """
        # An adaptive solver may probe beyond the segment. In float32 a base time could round across a knot.
        inside = torch.as_tensor(u, dtype=torch.float64).clamp(self._segment.start, self._segment.end)
        time, rate = self._schedule.at(inside, self._segment.number)
        return time.to(self._start.dtype), rate.to(self._start.dtype)

    def __call__(self, u: float | Tensor, state: Tensor, moving: Tensor | None = None) -> Tensor:
        """Evaluate dx/du = τ_k′(u)·v_k, (B, M); see `Velocity`."""
        time, rate = self.times_and_rates(u)
        v = self._velocity(self.whole(state), time, moving)
        return (self._composite.expand(rate.to(v.device)) * v)[:, self.columns]

    def renoise(self, state: Tensor, u: float, earlier: float) -> Tensor:
        """Lead streams back to times t̂ ≤ t: x ← t̂/t·x + √((1 − t̂)² − (t̂/t·(1 − t))²)·ξ; see `Velocity`.

        ξ is keyed by seed, segment and how often noise was drawn in it.
        """
        if self._seeds is None:
            raise SFDError(
                "this solver draws noise, but has no seeds to draw it from; give integrate one seed an image"
            )
        now, then = (
            self._composite.expand(self._schedule.at(torch.tensor(b, dtype=torch.float64), self._segment.number).time)
            for b in (u, earlier)
        )
        # A stream that is still pure noise stays as it is.
        kept = torch.where(now > 0, then / now.clamp(min=torch.finfo(now.dtype).tiny), 1.0)
        spread = ((1 - then) ** 2 - (kept * (1 - now)) ** 2).clamp(min=0).sqrt()
        key = (self._segment.number or 0, self._draws)
        drawn = randomness.normal(self._seeds, self._composite.size, "renoise", *key).to(state)
        self._draws += 1
        kept, spread = kept.to(state)[self.columns], spread.to(state)[self.columns]
        return kept * state + spread * drawn[:, self.columns]


def _report(callback: Callable[[Progress], None], piece: _Piece, counter: _Counter) -> Callable[[float, Tensor], None]:
    def report(u: float, state: Tensor) -> None:
        callback(Progress(u, piece.times_and_rates(u)[0], piece.whole(state), counter.calls))

    return report


def _moving_segments(schedule: Schedule) -> list[_Segment]:
    """List the segments in which something moves; monotone times that agree at both ends have stood still between."""
    segments = []
    for j, (start, end) in enumerate(schedule.segments):
        ends = schedule.at(torch.tensor([start, end], dtype=torch.float64), j).time
        moving = tuple((ends[1] > ends[0]).tolist())
        if any(moving):
            segments.append(_Segment(j, start, end, moving))
    return segments


def _grids(
    method: Solver,
    name: str,
    schedule: Schedule,
    segments: Sequence[_Segment],
    steps: int | None,
    shift: float,
    budget: Budget,
) -> list[list[float]]:
    """Place each segment's points: its ends, and the steps between if the solver does not choose them itself."""
    if not (math.isfinite(shift) and shift > 0):
        raise SFDError(f"the time shift must be finite and greater than 0 (1: none), got {shift}")
    check_steps(method, name, steps, len(segments))
    if steps is None:
        if shift != 1:
            raise SFDError(f"solver {name!r} chooses its own steps, so a time shift does nothing; leave it out")
        if budget != "length":
            raise SFDError(f"solver {name!r} chooses its own steps, so a budget of steps does nothing; leave it out")
        return [[s.start, s.end] for s in segments]
    # Steps are even in w, where u = s·w / (1 + (s − 1)·w); the inverse carries knots there, so they are still hit.
    ends = [(s.start / (shift + (1 - shift) * s.start), s.end / (shift + (1 - shift) * s.end)) for s in segments]
    counts = split_steps(steps, _shares(budget, schedule, segments, [b - a for a, b in ends]))
    grids = []
    for segment, (low, high), count in zip(segments, ends, counts, strict=True):
        w = np.linspace(low, high, count + 1)
        u = shift * w / (1 + (shift - 1) * w)
        grids.append([segment.start, *u[1:-1].tolist(), segment.end])
    return grids


def _shares(
    budget: Budget, schedule: Schedule, segments: Sequence[_Segment], lengths: Sequence[float]
) -> Sequence[float]:
    """Weigh the segments by a budget's rule."""
    if budget == "length":
        return lengths
    if budget == "equal":
        return [1.0] * len(segments)
    if budget == "time":
        ends = torch.tensor([(s.start, s.end) for s in segments], dtype=torch.float64)
        times = torch.stack([schedule.at(e, s.number).time for e, s in zip(ends, segments, strict=True)])  # (S, 2, K)
        return cast(list[float], (times[:, 1] - times[:, 0]).sum(dim=-1).tolist())
    if isinstance(budget, str):
        raise unknown("budget", budget, BUDGETS)
    if len(budget) != len(segments) or not all(math.isfinite(w) and w > 0 for w in budget):
        raise SFDError(
            f"a budget of weights needs one greater than 0 for each of the {len(segments)} segments in which a stream "
            f"moves, got {list(budget)}"
        )
    return budget


def _check_shapes(noise: Tensor, schedule: Schedule, composite: Composite, seeds: Sequence[int] | None) -> None:
    if schedule.streams != composite.names:
        raise SFDError(
            f"the schedule drives streams {', '.join(schedule.streams)}, but the latent has "
            f"{', '.join(composite.names)}; build the schedule with the names of the latent, in its order"
        )
    if noise.dim() != 2 or noise.shape[1] != composite.size:
        raise SFDError(f"noise must have shape (images, {composite.size}), got {tuple(noise.shape)}")
    if seeds is not None and len(seeds) != len(noise):
        raise SFDError(f"{len(seeds)} seeds were given for noise of {len(noise)} images; give one seed an image")
