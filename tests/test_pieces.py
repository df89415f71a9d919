"""Solvers stop where rates and velocities jump, so guidance within an interval costs them nothing of their order."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exact_flow import COMPOSITE, ORDERS, SCHEDULES, STREAMS, check_order, mixture, order
from sfd.guidance import Guided, guide
from sfd.models.toy import GaussianMixture
from sfd.pieces import pieces, split_steps
from sfd.sampling import check_plan, initial_noise, integrate
from sfd.schedules import Schedule, StreamTimes, build_schedule
from sfd.utils import rng
from sfd.utils.errors import SFDError
from test_schedules import SPECS

INTERVAL = {"texture": (0.25, 0.85), "semantic": (0.1, 0.7)}
JUMPS = [INTERVAL[name] for name in STREAMS]
SINGLE, WEAKER = mixture(1, seed=1), mixture(1, seed=2)


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return build_schedule(SCHEDULES[request.param], STREAMS)


@pytest.fixture
def offset() -> Schedule:
    return build_schedule(SCHEDULES["offset"], STREAMS)


@pytest.fixture
def noise() -> Tensor:
    return initial_noise(range(8), COMPOSITE).double()


class Weak:
    """A weak velocity that notes the stream times at which it is asked."""

    def __init__(self, data: GaussianMixture) -> None:
        self._data = data
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, times: Tensor) -> Tensor:
        self.times.append(times)
        return self._data.velocity(x, times)


def switched(weak=WEAKER.velocity) -> Guided:
    """Scale 0: inside the interval the weak Gaussian's velocity alone, outside the strong one's alone."""
    velocity = guide(SINGLE.velocity, weak, 0.0, COMPOSITE, INTERVAL)
    assert isinstance(velocity, Guided)
    return velocity


def carried(noise: Tensor) -> Tensor:
    """Where `switched` carries noise, exactly: a Gaussian's flow is x(t) = t·m + √V(t)·x0 on each entry's own time."""
    low, high = COMPOSITE.per_entry(torch.tensor(JUMPS, dtype=torch.float64).T)
    x, ends = noise, (torch.zeros_like(low), low, high, torch.ones_like(low))
    for data, (start, end) in zip((SINGLE, WEAKER, SINGLE), pairwise(ends), strict=True):
        before, after = (t**2 * data.stds**2 + (1 - t) ** 2 for t in (start, end))
        x = end * data.means + (after / before).sqrt() * (x - start * data.means)
    return x


@functools.cache
def guided_reference(spec: str) -> Tensor:
    """Where a guided mixture carries the noise by a schedule, to twelve digits."""
    noise, schedule = initial_noise(range(8), COMPOSITE).double(), build_schedule(json.loads(spec), STREAMS)
    tight = {"rtol": 1e-11, "atol": 1e-12}
    return integrate(guided_mixture(), noise, schedule, COMPOSITE, solver="dopri5", options=tight).x


def guided_mixture() -> Guided:
    velocity = guide(mixture(3).velocity, mixture(2, seed=2).velocity, 2.0, COMPOSITE, INTERVAL)
    assert isinstance(velocity, Guided)
    return velocity


def test_switching_fields_at_the_solvers_order(schedule, noise):
    exact = carried(noise)

    def error(steps: int) -> float:
        x = integrate(switched(), noise, schedule, COMPOSITE, solver="multistep", steps=steps).x
        return (x - exact).abs().mean().item()

    check_order(error, "multistep 3", steps=80)


@pytest.mark.parametrize("name", ["euler", "heun", "multistep 2", "multistep 3"])
@pytest.mark.parametrize("timing", ["offset", "synchronous", "sequential", "table"])
def test_a_guided_mixture_at_the_solvers_order(name, timing, noise):
    schedule = build_schedule(SCHEDULES[timing], STREAMS)
    exact = guided_reference(json.dumps(schedule.spec))

    def error(steps: int) -> float:
        x = integrate(guided_mixture(), noise, schedule, COMPOSITE, **ORDERS[name][0], steps=steps).x
        return (x - exact).abs().mean().item()

    check_order(error, name, steps=80)


def test_heun_blind_to_an_interval_loses_its_order(noise):
    """And approaches the same samples, also with a velocity that was told of pieces before."""
    schedule, velocity, exact = build_schedule(SCHEDULES["synchronous"], STREAMS), switched(), carried(noise)
    integrate(velocity, noise, schedule, COMPOSITE, solver="heun", steps=20)

    def error(steps: int) -> float:
        x = integrate(velocity, noise, schedule, COMPOSITE, solver="heun", steps=steps, knots=False).x
        return (x - exact).abs().mean().item()

    assert order(error, 60) < 1.3
    assert error(1001) < 0.01


@pytest.mark.parametrize("control", ["batch", "worst", "image"])
@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_dopri5_reaches_its_tolerance_across_an_interval(control, rtol, schedule, noise):
    options = {"rtol": rtol, "atol": rtol / 10, "control": control}
    x = integrate(switched(), noise, schedule, COMPOSITE, solver="dopri5", options=options).x
    assert (x - carried(noise)).abs().max() < 30 * rtol


@pytest.mark.parametrize("control", ["batch", "image"])
def test_dopri5_pays_for_pieces_and_not_for_jumps(control, schedule, noise):
    """As much as for the same pieces of a velocity that does not jump between them."""
    options = {"rtol": 1e-4, "atol": 1e-5, "control": control}

    def evaluations(weak: GaussianMixture) -> int:
        velocity = switched(weak.velocity)
        return integrate(velocity, noise, schedule, COMPOSITE, solver="dopri5", options=options).evaluations

    assert evaluations(WEAKER) < 1.35 * evaluations(SINGLE)


def test_images_with_steps_of_their_own_do_not_feel_each_other_across_an_interval(offset, noise):
    options = {"rtol": 1e-4, "control": "image"}

    def sample(start: Tensor) -> Tensor:
        return integrate(guided_mixture(), start, offset, COMPOSITE, solver="dopri5", options=options).x

    torch.testing.assert_close(sample(noise)[2:4], sample(noise[2:4]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["heun", "multistep", "dopri5"])
def test_the_weak_model_is_asked_in_guided_pieces_alone(solver, schedule, noise):
    weak = Weak(WEAKER)
    steps = None if solver == "dopri5" else 30
    velocity = switched(weak)
    result = integrate(velocity, noise, schedule, COMPOSITE, solver=solver, steps=steps)
    times = torch.stack(weak.times)
    low, high = torch.tensor(JUMPS, dtype=torch.float64).T
    assert ((low - 1e-9 <= times) & (times <= high + 1e-9)).any(dim=1).all()
    assert 0 < velocity.weak_evaluations == len(weak.times) < result.evaluations


def test_an_interval_of_a_single_time_guides_nothing(noise):
    weak, schedule = Weak(WEAKER), build_schedule(SCHEDULES["synchronous"], STREAMS)
    velocity = guide(SINGLE.velocity, weak, 2.0, COMPOSITE, (0.5, 0.5))
    integrate(velocity, noise, schedule, COMPOSITE, solver="heun", steps=2)
    assert not weak.times


def test_each_guided_piece_asks_the_weak_model_anew(offset, noise):
    """Of the seven pieces of the offset schedule all but the first and the last are guided."""
    weak = Weak(WEAKER)
    velocity = guide(SINGLE.velocity, weak, 2.0, COMPOSITE, INTERVAL, weak_every=100)
    integrate(velocity, noise, offset, COMPOSITE, solver="euler", steps=40)
    starts = torch.tensor([p.start for p in pieces(offset, JUMPS)], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(weak.times), offset.at(starts).time[1:-1])


@pytest.mark.parametrize("solver", ["multistep", "heun", "sde", "dopri5"])
def test_an_interval_over_all_times_changes_no_bit(solver, schedule, noise):
    def sample(interval) -> Tensor:
        velocity = guide(mixture(3).velocity, WEAKER.velocity, 2.0, COMPOSITE, interval)
        steps = None if solver == "dopri5" else 17
        return integrate(velocity, noise, schedule, COMPOSITE, solver=solver, steps=steps, seeds=range(8)).x

    assert torch.equal(sample((0.0, 1.0)), sample(None))


def test_noise_on_the_way_is_fresh_in_every_piece(offset, noise, monkeypatch):
    keys: list[tuple[int, ...]] = []
    draw = rng.normal

    def noted(seeds: Sequence[int], size: int, purpose: str, *key: int) -> Tensor:
        keys.append(key)
        return draw(seeds, size, purpose, *key)

    monkeypatch.setattr(rng, "normal", noted)
    integrate(switched(), noise, offset, COMPOSITE, solver="sde", steps=35, seeds=range(8))
    assert len(keys) == len(set(keys)) == 35 - len(pieces(offset, JUMPS))  # a piece begins without noise


@given(SPECS, st.lists(st.lists(st.floats(0, 1), max_size=3), min_size=2, max_size=2))
def test_pieces_cover_what_moves_and_hold_no_jump(spec, jumps):
    schedule = build_schedule(spec, STREAMS)
    found = pieces(schedule, jumps)
    for j, segment in enumerate(schedule.segments):
        within = [p for p in found if p.segment == j]
        if within:
            assert (within[0].start, within[-1].end) == segment
        assert all(a.end == b.start and a.moving == b.moving for a, b in pairwise(within))
        for p in within:
            assert p.start < p.end
            first, last = schedule.at(torch.tensor([p.start, p.end], dtype=torch.float64), j).time
            for k in range(2):
                assert all(t <= first[k] + 2e-9 or t >= last[k] - 2e-9 for t in jumps[k])
    none = pieces(schedule)
    assert sum(p.end - p.start for p in found) == pytest.approx(sum(p.end - p.start for p in none))


@pytest.mark.parametrize(
    ("jumps", "count"),
    [
        (None, 3),
        ([(), ()], 3),
        ([(0.0, 0.7), (0.3, 1.0)], 3),  # on the knots
        ([(0.7 + 1e-12,), (0.3 - 1e-12,)], 3),
        ([(0.4,), ()], 4),
        ([(0.4,), (0.7,)], 4),  # at one base time
        ([(0.4,), (0.7 + 1e-6,)], 5),
        ([(0.2, 0.8), (0.2, 0.8)], 7),
    ],
)
def test_stops_that_coincide_are_one(jumps, count, offset):
    assert len(pieces(offset, jumps)) == count


def test_a_stream_that_rests_at_an_end_is_guided_on_the_intervals_side_alone():
    """Semantics reach 0.5, wait there, and go on: guided up to 0.5 or from there on, at rest it does not matter."""
    points = {"texture": [[0, 0], [1, 1]], "semantic": [[0, 0], [0.3, 0.5], [0.6, 0.5], [1, 1]]}
    schedule = build_schedule({"name": "table", "points": points}, STREAMS)
    found = pieces(schedule, [(), (0.5,)])
    assert [(p.start, p.end) for p in found] == list(schedule.segments)
    assert [p.middle[1] for p in found] == pytest.approx([0.25, 0.5, 0.75])
    assert [p.moving[1] for p in found] == [True, False, True]


class Resting(Schedule):
    """Semantics rest at 0.5 within a segment, as a smooth curve with a very flat middle would."""

    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        before, after = (u < 0.2).to(u), (u > 0.9).to(u)
        semantic = 0.5 * (u / 0.2).clamp(max=1) + 0.5 * ((u - 0.9) / 0.1).clamp(min=0)
        return StreamTimes(
            torch.stack([u, semantic], dim=-1), torch.stack([torch.ones_like(u), 2.5 * before + 5 * after], dim=-1)
        )


def test_a_rest_within_a_piece_does_not_decide_its_side():
    before, after = pieces(Resting(STREAMS), [(), (0.5,)])
    assert before.end == after.start == pytest.approx(0.2)
    assert before.middle[1] == pytest.approx(0.25)
    assert after.middle[1] == pytest.approx(0.75)


def test_a_shift_keeps_the_stops(offset, noise):
    seen: list[float] = []
    integrate(
        switched(), noise, offset, COMPOSITE, solver="euler", steps=20, shift=0.3, callback=lambda p: seen.append(p.u)
    )
    assert {p.end for p in pieces(offset, JUMPS)} <= set(seen)


def test_shift_places_steps_as_its_formula_says(noise):
    seen: list[float] = []
    schedule = build_schedule({"name": "synchronous"}, STREAMS)
    integrate(
        mixture(1).velocity, noise, schedule, COMPOSITE, solver="euler", steps=4, shift=0.3,
        callback=lambda p: seen.append(p.u),
    )  # fmt: skip
    assert seen == pytest.approx([0.3 * w / (1 - 0.7 * w) for w in (0.25, 0.5, 0.75, 1.0)], abs=1e-15)


@pytest.mark.parametrize(
    ("budget", "counts"),
    [("length", [3, 7, 3]), ("equal", [5, 4, 4]), ("time", [2, 9, 2]), ((1.0, 2.0, 10.0), [1, 2, 10])],
)
def test_a_budget_divides_the_steps(budget, counts, offset, noise):
    """The offset schedule's segments have lengths 3, 7, 3 of 13, and streams travel 0.3, 1.4, 0.3 in them."""
    seen: list[float] = []
    integrate(
        mixture(1).velocity, noise, offset, COMPOSITE, solver="euler", steps=13, budget=budget,
        callback=lambda p: seen.append(p.u),
    )  # fmt: skip
    assert [sum(low < u <= high for u in seen) for low, high in offset.segments] == counts


@pytest.mark.parametrize(
    ("budget", "counts"),
    [
        ("length", [3, 6, 6, 15, 9]),
        ("equal", [4, 9, 4, 9, 13]),
        ("time", [2, 4, 8, 19, 6]),
        ((1.0, 2.0, 1.0), [3, 6, 6, 14, 10]),
    ],
)
def test_the_pieces_of_a_segment_share_its_steps_by_length(budget, counts, offset, noise):
    """Semantics at 0.1 divide the first segment 1 : 2, texture at 0.2 the second 2 : 5."""
    seen: list[float] = []
    interval = {"texture": (0.2, 1.0), "semantic": (0.1, 1.0)}
    integrate(
        guide(SINGLE.velocity, WEAKER.velocity, 2.0, COMPOSITE, interval), noise, offset, COMPOSITE, solver="euler",
        steps=39, budget=budget, callback=lambda p: seen.append(p.u),
    )  # fmt: skip
    found = pieces(offset, [(0.2,), (0.1,)])
    assert [sum(p.start < u <= p.end for u in seen) for p in found] == counts


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8), st.integers(0, 300))
def test_steps_are_split_by_length(lengths, extra):
    steps = len(lengths) + extra
    counts = split_steps(steps, lengths)
    assert sum(counts) == steps
    assert min(counts) >= 1
    quotas = [steps * length / math.fsum(lengths) for length in lengths]
    if min(quotas) >= 1:
        assert all(abs(c - q) < 1 + 1e-9 for c, q in zip(counts, quotas, strict=True))


def test_too_few_steps_name_the_stops(offset):
    message = (
        r"the schedule's knots \(u = 0.2308, 0.7692\) and the velocity's jumps, such as the ends of a guidance "
        r"interval \(texture at 0.25 and 0.85, semantic at 0.1 and 0.7\), and each of the 7 pieces between needs one, "
        "but 6 steps were asked for; give at least 7"
    )
    with pytest.raises(SFDError, match=message):
        check_plan(offset, "euler", 6, {}, 1.0, jumps=JUMPS)
    check_plan(offset, "euler", 7, {}, 1.0, jumps=JUMPS)
