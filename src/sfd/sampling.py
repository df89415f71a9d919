"""Sampling: noise by image seed, then dx_k/du = τ_k′(u)·v_k from u = 0 to u = 1, one piece after another.

A piece ends where a rate τ_k′ or the velocity jumps (`sfd.pieces`). It is integrated with the one-sided limits at its
ends, over the streams that move in it; the others are not part of its state. The sampler knows nothing of classes,
networks, guidance or autoencoders: it gets a velocity function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfd.guidance import VelocityField
from sfd.latents import CompositeLatent
from sfd.pieces import Budget, Jumps, Piece, PiecewiseVelocity, grids, pieces, whole
from sfd.schedules import Schedule
from sfd.solvers import load_solver
from sfd.utils import rng
from sfd.utils.errors import SFDError
from sfd.utils.transfer import sent


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


def initial_noise(seeds: Sequence[int], composite: CompositeLatent) -> Tensor:
    """Draw where sampling starts, image k from seeds[k] alone: (len(seeds), N), float32, on the CPU.

    Raises:
        SFDError: a negative seed.
    """
    check_seeds(seeds)
    return rng.normal(seeds, composite.size, "noise")


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
    jumps: Jumps | None = None,
) -> None:
    """Check what `integrate` would check of a velocity with these jumps, before there is anything to integrate.

    Raises:
        SFDError: solver, options, steps, shift and budget do not fit the schedule, the jumps or each other.
    """
    method, _ = load_solver(solver, options)
    grids(method, solver, schedule, pieces(schedule, jumps), steps, shift, budget, jumps)


def integrate(
    velocity: VelocityField,
    noise: Tensor,
    schedule: Schedule,
    composite: CompositeLatent,
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
        velocity: v(x, times) with x (B, N) packed and times (K,) on the CPU in x's dtype, or (B, K) if each image takes
            its own steps; returns (B, N). A `PiecewiseVelocity` says where it jumps, and no step crosses that.
        noise: (B, N), the state at u = 0; not written to.
        schedule: times and rates of the composite's streams.
        composite: the streams.
        solver: name of a module in `sfd.solvers`.
        steps: how many in all, at least one a piece; None for adaptive solvers.
        options: settings of the solver.
        shift: s in [0.01, 100] maps an even grid w of steps to u = s·w / (1 + (s − 1)·w); 1 keeps it even, less than 1
            puts more steps near noise. Adaptive solvers take no shift.
        budget: how steps are divided over the segments in which something moves: in proportion to their length in w
            ("length"), evenly ("equal"), in proportion to the stream time that all streams together travel in them
            ("time"), or to given weights, one a segment. The pieces of a segment share its steps by length. Adaptive
            solvers take none but the default.
        seeds: of the images, from which a stochastic solver draws its noise; others need none.
        knots: whether to stop at knots and jumps. False integrates [0, 1] as one piece, blind to them, as the published
            sampler does: a fixed step has rates and guidance as at the points where it evaluates. Only to compare.
        callback: called after each step.

    Returns:
        the state at u = 1 and the number of velocity evaluations.

    Raises:
        SFDError: schedule and composite have other streams, noise has another size, seeds another number, or solver,
            steps, options, shift and budget do not fit together.
    """
    _check_shapes(noise, schedule, composite, seeds)
    method, settings = load_solver(solver, options)
    jumps = velocity.jumps if knots and isinstance(velocity, PiecewiseVelocity) else None
    parts = pieces(schedule, jumps) if knots else whole(schedule)
    placed = grids(method, solver, schedule, parts, steps, shift, budget, jumps)
    counter, drawn = _Counter(velocity, len(noise)), _Noise(seeds, composite)
    x = noise
    for piece, points in zip(parts, placed, strict=True):
        if isinstance(velocity, PiecewiseVelocity):
            velocity.begin(piece.moving, piece.middle)
        equation = _Equation(counter, x, schedule, composite, piece, points, drawn)
        report = _report(callback, equation, counter) if callback is not None else None
        x = equation.whole(method.solve(equation, equation.moving_entries(x), points, settings, report))
    return Result(x, counter.calls, counter.by_image)


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


class _Noise:
    """Fresh noise for stochastic solvers, keyed by seed, segment and how often noise was drawn in it."""

    def __init__(self, seeds: Sequence[int] | None, composite: CompositeLatent) -> None:
        self._seeds = seeds
        self._size = composite.size
        self._draws: Counter[int] = Counter()  # by segment

    def draw(self, segment: int) -> Tensor:
        """Draw (B, N), float32, on the CPU."""
        if self._seeds is None:
            raise SFDError(
                "this solver draws noise, but has no seeds to draw it from; give integrate one seed an image"
            )
        drawn = rng.normal(self._seeds, self._size, "renoise", segment, self._draws[segment])
        self._draws[segment] += 1
        return drawn


class _Equation:
    """The differential equation of one piece, for the entries of the streams that move in it; a `Velocity`."""

    def __init__(
        self,
        velocity: _Counter,
        x: Tensor,
        schedule: Schedule,
        composite: CompositeLatent,
        piece: Piece,
        points: Sequence[float],
        noise: _Noise,
    ) -> None:
        self._velocity = velocity
        self._start = x
        self._schedule = schedule
        self._composite = composite
        self._piece = piece
        self._noise = noise
        self._all_move = all(piece.moving)
        self._sizes = [s.size for s in composite.streams]
        self._moving_sizes = [s for s, moves in zip(self._sizes, piece.moving, strict=True) if moves]
        times, rates = self._look_up(torch.tensor(points, dtype=torch.float64))
        self._known = dict(zip(points, zip(times, rates, strict=True), strict=True))
        self._expanded: tuple[Tensor, Tensor] | None = None  # the last rates, and those of all moving entries

    # Streams are cut out and joined as the slices that they are: indices would take several times as long.

    def moving_entries(self, packed: Tensor) -> Tensor:
        """Take the entries of the streams that move, (…, M) of (…, N)."""
        if self._all_move:
            return packed
        parts = zip(packed.split(self._sizes, dim=-1), self._piece.moving, strict=True)
        taken = [part for part, moves in parts if moves]
        return torch.cat(taken, dim=-1) if len(taken) > 1 else taken[0]

    def whole(self, state: Tensor) -> Tensor:
        """Put moving entries (B, M) among the resting ones: (B, N)."""
        if self._all_move:
            return state
        moved = iter(state.split(self._moving_sizes, dim=1))
        resting = self._start.split(self._sizes, dim=1)
        pairs = zip(resting, self._piece.moving, strict=True)
        return torch.cat([next(moved) if moves else rests for rests, moves in pairs], dim=1)

    def times_and_rates(self, u: float | Tensor) -> tuple[Tensor, Tensor]:
        """Look up stream times and rates at u, with the piece's one-sided limits; on the CPU, in x's dtype.

        (K,) each, or (B, K) at base times (B,).
        """
        known = self._known.get(u) if isinstance(u, float) else None
        return known or self._look_up(torch.as_tensor(u, dtype=torch.float64))

    def _look_up(self, u: Tensor) -> tuple[Tensor, Tensor]:
        # An adaptive solver may probe beyond the piece. In float32 a base time could round across a knot.
        time, rate = self._schedule.at(u.clamp(self._piece.start, self._piece.end), self._piece.segment)
        return time.to(self._start.dtype), rate.to(self._start.dtype)

    def _rates(self, rate: Tensor, device: torch.device) -> Tensor:
        """Give each moving entry its stream's rate; made anew only where a rate changes."""
        if self._expanded is None or not torch.equal(rate, self._expanded[0]):
            self._expanded = rate, self.moving_entries(self._composite.per_entry(sent(rate, device)))
        return self._expanded[1]

    def __call__(self, u: float | Tensor, state: Tensor, moving: Tensor | None = None) -> Tensor:
        """Evaluate dx/du = τ_k′(u)·v_k, (B, M); see `Velocity`."""
        time, rate = self.times_and_rates(u)
        v = self._velocity(self.whole(state), time, moving)
        return self._rates(rate, v.device) * self.moving_entries(v)

    def renoise(self, state: Tensor, u: float, earlier: float) -> Tensor:
        """Lead streams back to times t̂ ≤ t: x ← t̂/t·x + √((1 − t̂)² − (t̂/t·(1 − t))²)·ξ; see `Velocity`."""
        now, then = (
            self._composite.per_entry(self._schedule.at(torch.tensor(b, dtype=torch.float64), self._piece.segment).time)
            for b in (u, earlier)
        )
        # A stream that is still pure noise stays as it is.
        kept = torch.where(now > 0, then / now.clamp(min=torch.finfo(now.dtype).tiny), 1.0)
        spread = ((1 - then) ** 2 - (kept * (1 - now)) ** 2).clamp(min=0).sqrt()
        drawn = self._noise.draw(self._piece.segment or 0)
        kept, spread, drawn = (
            self.moving_entries(sent(each.to(state.dtype), state.device)) for each in (kept, spread, drawn)
        )
        return kept * state + spread * drawn


def _report(
    callback: Callable[[Progress], None], equation: _Equation, counter: _Counter
) -> Callable[[float, Tensor], None]:
    def report(u: float, state: Tensor) -> None:
        callback(Progress(u, equation.times_and_rates(u)[0], equation.whole(state), counter.calls))

    return report


def _check_shapes(noise: Tensor, schedule: Schedule, composite: CompositeLatent, seeds: Sequence[int] | None) -> None:
    if schedule.streams != composite.names:
        raise SFDError(
            f"the schedule drives streams {', '.join(schedule.streams)}, but the latent has "
            f"{', '.join(composite.names)}; build the schedule with the names of the latent, in its order"
        )
    if noise.dim() != 2 or noise.shape[1] != composite.size:
        raise SFDError(f"noise must have shape (images, {composite.size}), got {tuple(noise.shape)}")
    if seeds is not None and len(seeds) != len(noise):
        raise SFDError(f"{len(seeds)} seeds were given for noise of {len(noise)} images; give one seed an image")
