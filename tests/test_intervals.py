"""Smooth intervals: solvers stop where rates and guidance jump and keep their order; steps are split by length."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.exact_flow import COMPOSITE, STREAMS, check_order, mixture, order
from sfd.guidance import GuidedVelocity, PiecewiseVelocity, guide
from sfd.models.toy import GaussianMixture
from sfd.sampling import integrate, smooth_intervals, split_steps
from sfd.schedule import Schedule, StreamTimes, build_schedule
from sfd.utils import rng
from sfd.utils.errors import SFDError
from test_schedules import SPECS

INTERVAL = {"texture": (0.25, 0.85), "semantic": (0.1, 0.7)}
JUMPS = [INTERVAL[name] for name in STREAMS]
SINGLE, OTHER = mixture(1, seed=1), mixture(1, seed=2)


class Counted:
    """A velocity that records the stream times of its evaluations."""

    def __init__(self, data: GaussianMixture) -> None:
        self._data = data
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        return self._data.velocity(x, t)


def switched(guiding=OTHER.velocity) -> GuidedVelocity:
    """Scale 0: the guiding Gaussian's velocity inside the interval, the conditional one's outside."""
    return guide(SINGLE.velocity, guiding, 0.0, COMPOSITE, INTERVAL)


def carried(noise: Tensor) -> Tensor:
    """The exact solution of `switched`: a Gaussian's flow is x(t) = t·m + √V(t)·x0 in each entry's own time."""
    low, high = COMPOSITE.per_entry(torch.tensor(JUMPS, dtype=torch.float64).T)
    x, ends = noise, (torch.zeros_like(low), low, high, torch.ones_like(low))
    for data, (start, end) in zip((SINGLE, OTHER, SINGLE), pairwise(ends), strict=True):
        before, after = (t**2 * data.stds**2 + (1 - t) ** 2 for t in (start, end))
        x = end * data.means + (after / before).sqrt() * (x - start * data.means)
    return x


def test_multistep_keeps_its_order_where_guidance_switches(schedule, noise):
    exact = carried(noise)

    def error(steps: int) -> float:
        x = integrate(switched(), noise, schedule, COMPOSITE, solver="multistep", steps=steps).x
        return (x - exact).abs().mean().item()

    check_order(error, "multistep 3", steps=80)


def test_a_step_is_not_corrected_across_a_jump(offset, noise):
    """Constant pieces of velocity, one step each: Euler's method is exact, a correction would mix the pieces."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(x)

    guided = guide(velocity, lambda x, t: 3 * velocity(x, t), 0.0, COMPOSITE, {"texture": (0.35, 1.0)})
    x = integrate(guided, noise, offset, COMPOSITE, solver="multistep", steps=4).x
    texture = COMPOSITE.unpack(x - noise)["texture"]
    torch.testing.assert_close(texture, torch.full_like(texture, 0.35 + 3 * 0.65))


class Coupled(PiecewiseVelocity):
    """v = t, of which is not known that each stream's is continuous at the knots of others."""

    independent = False
    discontinuities = [(), ()]

    def on_interval(self, active, midpoint):
        return self

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return COMPOSITE.per_entry(t).expand_as(x)


def test_a_step_is_not_corrected_where_streams_are_coupled(offset, noise):
    x = integrate(Coupled(), noise, offset, COMPOSITE, solver="multistep", steps=3).x
    texture = COMPOSITE.unpack(x - noise)["texture"]
    torch.testing.assert_close(texture, torch.full_like(texture, 0.3 * 0.7))  # Euler's steps


def test_dopri5_reaches_its_tolerance_across_an_interval(schedule, noise):
    options = {"rtol": 1e-6, "atol": 1e-7}
    x = integrate(switched(), noise, schedule, COMPOSITE, solver="dopri5", options=options).x
    assert (x - carried(noise)).abs().max() < 3e-5


@pytest.mark.parametrize("solver", ["heun", "multistep", "dopri5"])
def test_the_guiding_model_is_evaluated_inside_its_interval_alone(solver, offset, noise):
    guiding = Counted(OTHER)
    result = integrate(switched(guiding), noise, offset, COMPOSITE, solver=solver, steps=30)
    times = torch.stack(guiding.times)
    low, high = torch.tensor(JUMPS, dtype=torch.float64).T
    assert ((low - 1e-9 <= times) & (times <= high + 1e-9)).any(dim=1).all()
    assert 0 < len(guiding.times) < result.nfe


@given(SPECS, st.lists(st.lists(st.floats(0, 1), max_size=3), min_size=2, max_size=2))
def test_smooth_intervals_cover_all_movement_and_contain_no_jump(spec, jumps):
    schedule = build_schedule(spec, STREAMS)
    found = smooth_intervals(schedule, jumps)
    for j, segment in enumerate(schedule.segments):
        within = [p for p in found if p.segment == j]
        if within:
            assert (within[0].start, within[-1].end) == segment
        assert all(a.end == b.start and a.active == b.active for a, b in pairwise(within))
        for p in within:
            assert p.start < p.end
            first, last = schedule.at(torch.tensor([p.start, p.end], dtype=torch.float64), j).time
            for k in range(2):
                assert all(t <= first[k] + 2e-9 or t >= last[k] - 2e-9 for t in jumps[k])
    none = smooth_intervals(schedule)
    assert sum(p.end - p.start for p in found) == pytest.approx(sum(p.end - p.start for p in none))


@pytest.mark.parametrize(
    ("jumps", "count"),
    [
        ((), 3),
        ([(), ()], 3),
        ([(0.0, 0.7), (0.3, 1.0)], 3),  # on the knots
        ([(0.7 + 1e-12,), (0.3 - 1e-12,)], 3),
        ([(0.4,), ()], 4),
        ([(0.4,), (0.7,)], 4),  # at one base time
        ([(0.4,), (0.7 + 1e-6,)], 5),
        ([(0.2, 0.8), (0.2, 0.8)], 7),
    ],
)
def test_stops_that_coincide_are_merged(jumps, count, offset):
    assert len(smooth_intervals(offset, jumps)) == count


class Resting(Schedule):
    """Semantics rest at 0.5 within a segment."""

    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        before, after = (u < 0.2).to(u), (u > 0.9).to(u)
        semantic = 0.5 * (u / 0.2).clamp(max=1) + 0.5 * ((u - 0.9) / 0.1).clamp(min=0)
        return StreamTimes(
            torch.stack([u, semantic], dim=-1), torch.stack([torch.ones_like(u), 2.5 * before + 5 * after], dim=-1)
        )


def test_the_side_of_a_jump_follows_the_ends_of_an_interval_not_its_middle():
    before, after = smooth_intervals(Resting(STREAMS), [(), (0.5,)])
    assert before.end == after.start == pytest.approx(0.2)
    assert before.midpoint[1] == pytest.approx(0.25)
    assert after.midpoint[1] == pytest.approx(0.75)


def steps_taken(noise, schedule, velocity=SINGLE.velocity, **how) -> list[float]:
    seen: list[float] = []
    integrate(velocity, noise, schedule, COMPOSITE, solver="euler", callback=lambda p: seen.append(p.u), **how)
    return seen


def test_a_shift_keeps_the_stops_and_follows_its_formula(noise, offset):
    stops = {p.end for p in smooth_intervals(offset, JUMPS)}
    assert stops <= set(steps_taken(noise, offset, switched(), steps=20, shift=0.3))
    even = steps_taken(noise, build_schedule("synchronous", STREAMS), steps=4, shift=0.3)
    assert even == pytest.approx([0.3 * w / (1 - 0.7 * w) for w in (0.25, 0.5, 0.75, 1.0)], abs=1e-15)


def test_intervals_share_the_steps_by_length(noise, offset):
    """The offset schedule's segments have lengths 3, 7, 3 of 13; semantics at 0.1 divide the first one 1 : 2."""
    velocity = guide(SINGLE.velocity, OTHER.velocity, 2.0, COMPOSITE, {"texture": (0, 1), "semantic": (0.1, 1.0)})
    seen = steps_taken(noise, offset, velocity, steps=39)
    found = smooth_intervals(offset, [(), (0.1,)])
    assert [sum(p.start < u <= p.end for u in seen) for p in found] == [3, 6, 21, 9]


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8), st.integers(0, 300))
def test_steps_are_split_by_length(lengths, extra):
    steps = len(lengths) + extra
    counts = split_steps(steps, lengths)
    assert sum(counts) == steps
    assert min(counts) >= 1
    quotas = [steps * length / math.fsum(lengths) for length in lengths]
    if min(quotas) >= 1:
        assert all(abs(c - q) < 1 + 1e-9 for c, q in zip(counts, quotas, strict=True))


def test_too_few_steps_are_refused_with_the_number_needed(noise, offset):
    with pytest.raises(SFDError, match=r"0\.2308.*at least 7 are needed, but 6"):
        integrate(switched(), noise, offset, COMPOSITE, solver="euler", steps=6)


# The stochastic solver. For one Gaussian the exact velocity is affine, so a sampling is an affine map of its initial
# and its fresh noise. Unit impulses in place of the noise give that map's coefficients: mean and variance, exactly.


def sde_moments(schedule: Schedule, steps: int, eta: float, monkeypatch) -> tuple[Tensor, Tensor]:
    """Mean and variance (N,) of samples with this many steps."""
    impulses, drawn = steps + 2, []

    def normal(seeds: range, size: int, *key: object) -> Tensor:
        noise = torch.zeros(impulses, size, dtype=torch.float64)
        noise[2 + len(drawn)] = 1
        drawn.append(key)
        return noise

    start = torch.zeros(impulses, COMPOSITE.size, dtype=torch.float64)
    start[1] = 1  # row 0 has no noise at all, row 1 that of the start, each other row one of the fresh ones
    with monkeypatch.context() as patched:
        patched.setattr(rng, "normal", normal)
        how = {"solver": "sde", "steps": steps, "options": {"noise": eta}}
        x = integrate(mixture(1).velocity, start, schedule, COMPOSITE, seeds=range(impulses), **how).x
    intervals = len(smooth_intervals(schedule))
    assert len(set(drawn)) == len(drawn) == steps - intervals, "fresh each time, but at an interval's start"
    return x[0], (x[1:] - x[0]).square().sum(0)


def test_sde_variance_converges_at_order_two_across_knots(schedule, monkeypatch):
    data = mixture(1)

    def error(steps: int) -> float:
        mean, variance = sde_moments(schedule, steps, 1.0, monkeypatch)
        torch.testing.assert_close(mean, data.means[0], rtol=0, atol=1e-12)  # which any consistent method keeps here
        return (variance / data.stds[0].square() - 1).abs().mean().item()

    assert error(96) < 0.003  # noise that is 2 % too strong or too weak makes it 0.04
    assert 1.9 < order(error, 48) < 2.2
