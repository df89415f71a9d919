"""Every schedule is a monotone map from 0 to 1 whose rate is its derivative away from its knots."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfd.schedule import SCHEDULES, PiecewiseLinear, Schedule, StreamTimes, build_schedule, validate
from sfd.utils.errors import SFDError

STREAMS = ("texture", "semantic")
DELTAS = st.floats(0, 4) | st.sampled_from([0.0, 0.3, 1.0, 1e-17, 1e-8, 1 - 1e-12, 1e6])


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Monotone points on a grid of thousandths, flat stretches among them, another number of points per stream."""
    points = {}
    for name in STREAMS:
        base = sorted(draw(st.sets(st.integers(1, 999), max_size=6)))
        time = sorted(draw(st.lists(st.integers(0, 1000), min_size=len(base), max_size=len(base))))
        inner = [[u / 1000, t / 1000] for u, t in zip(base, time, strict=True)]
        points[name] = [[0, 0], *inner, [1, 1]]
    return {"name": "table", "points": points}


@st.composite
def learned(draw: st.DrawFn) -> dict[str, Any]:
    """Whole increments, zeros among them, in intervals of different lengths."""
    count = draw(st.integers(1, 6))
    rows = st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any)
    base = draw(st.none() | st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return {"name": "learned", "increments": {name: draw(rows) for name in STREAMS}, "base": base}


SPECS = (
    st.builds(lambda delta: {"name": "offset", "delta": delta}, DELTAS)
    | tables()
    | learned()
    | st.sampled_from([{"name": "synchronous"}, {"name": "sequential"}])
)


@given(SPECS)
def test_times_rise_from_exactly_0_to_exactly_1_over_adjacent_segments(spec):
    schedule = build_schedule(spec, STREAMS)
    for dtype in (torch.float32, torch.float64):
        time, _ = schedule.at(torch.tensor([0.0, 1.0], dtype=dtype))
        assert torch.equal(time, torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=dtype))
    segments = schedule.segments
    assert (segments[0][0], segments[-1][1]) == (0, 1) and all(a[1] == b[0] for a, b in pairwise(segments))
    time, rate = schedule.at(torch.cat([torch.linspace(*ends, 33, dtype=torch.float64) for ends in segments]))
    assert (time.diff(dim=0) >= -1e-15).all() and ((time >= 0) & (time <= 1)).all() and (rate >= 0).all()


@given(SPECS)
def test_rate_is_the_derivative_within_segments(spec):
    schedule = build_schedule(spec, STREAMS)
    for j, (low, high) in enumerate(schedule.segments):
        h = (high - low) / 100
        if h < 1e-6:
            continue  # a difference of neighbouring floats says nothing
        u = torch.linspace(low + 2 * h, high - 2 * h, 17, dtype=torch.float64)
        difference = (schedule.at(u + h).time - schedule.at(u - h).time) / (2 * h)
        torch.testing.assert_close(schedule.at(u).rate, difference, rtol=1e-7, atol=1e-9)
        assert torch.equal(schedule.at(u).rate, schedule.at(u, j).rate)


@given(SPECS)
def test_some_rate_jumps_at_every_knot(spec):
    schedule = build_schedule(spec, STREAMS)
    for j, knot in enumerate(schedule.knots):
        u = torch.tensor(knot, dtype=torch.float64)
        before, after = schedule.at(u, j), schedule.at(u, j + 1)
        torch.testing.assert_close(before.time, after.time, rtol=0, atol=1e-15)
        assert not torch.equal(before.rate, after.rate)
        assert torch.equal(schedule.at(u).rate, after.rate)


@given(SPECS, st.integers(0, 1), st.floats(0, 1))
def test_first_time_is_exact(spec, stream, time):
    schedule = build_schedule(spec, STREAMS)
    for j, (low, high) in enumerate(schedule.segments):
        u = schedule.first_time(stream, time, j)
        before = max(low, math.nextafter(u, -1))
        ends = schedule.at(torch.tensor([low, before, u, high], dtype=torch.float64), j).time[:, stream]
        if ends[0] >= time:
            assert u == low
        elif ends[3] < time:
            assert u == high
        else:
            assert ends[1] < time <= ends[2]


@given(SPECS)
def test_spec_builds_an_equal_schedule(spec):
    schedule = build_schedule(spec, STREAMS)
    again = build_schedule(schedule.spec, STREAMS)
    u = torch.linspace(0, 1, 101)
    assert again.spec == schedule.spec
    assert again.knots == schedule.knots
    assert torch.equal(again.at(u).time, schedule.at(u).time)


@given(st.floats(0, 4), st.floats(0, 1))
def test_offset_equals_the_published_formula(delta, u):
    time, _ = build_schedule({"name": "offset", "delta": delta}, STREAMS).at(torch.tensor(u, dtype=torch.float64))
    expected = [max(0.0, (1 + delta) * u - delta), min(1.0, (1 + delta) * u)]
    assert time.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("delta", "name", "knots"),
    [(0, "synchronous", ()), (1, "sequential", (0.5,)), (0.3, {"name": "offset"}, (0.3 / 1.3, 1 / 1.3))],
)
def test_special_cases_of_the_offset(delta, name, knots):
    u = torch.linspace(0, 1, 1001)
    schedule, same = build_schedule({"name": "offset", "delta": delta}, STREAMS), build_schedule(name, STREAMS)
    assert schedule.knots == same.knots == pytest.approx(knots, abs=0)
    assert torch.equal(schedule.at(u).time, same.at(u).time) and torch.equal(schedule.at(u).rate, same.at(u).rate)


def test_several_leaders():
    spec = {"name": "offset", "delta": 0.5, "leaders": ["a", "c"]}
    time, _ = build_schedule(spec, ("a", "b", "c")).at(torch.tensor(0.25, dtype=torch.float64))
    assert time.tolist() == pytest.approx([0.375, 0.0, 0.375])


@pytest.mark.parametrize(("delta", "steps"), [(0.2, 6), (0.4, 7), (0.8, 9)])
def test_a_rounded_point_on_a_knot_has_the_rate_after_it(delta, steps):
    schedule = build_schedule({"name": "offset", "delta": delta}, ("texture", "semantic"))
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    for knot in schedule.knots:
        on = u[(u - knot).abs() < 1e-12]
        after = schedule.at(torch.tensor(knot + 1e-6, dtype=torch.float64)).rate
        assert all(torch.equal(rate, after) for rate in schedule.at(on).rate)
    assert any((u - knot).abs().min() < 1e-12 for knot in schedule.knots)


def test_points_on_a_line_are_no_knots():
    line = [[0, 0], [0.1, 0.1], [0.7, 0.7], [1, 1]]
    bent = [[0, 0], [0.3, 0.6], [1, 1]]
    assert build_schedule({"name": "table", "points": {"texture": line, "semantic": line}}, STREAMS).knots == ()
    assert build_schedule({"name": "table", "points": {"texture": line, "semantic": bent}}, STREAMS).knots == (0.3,)


class Smooth(Schedule):
    """τ(u) = u^p, one p per stream."""

    def __init__(self, powers: dict[str, float]) -> None:
        super().__init__(tuple(powers))
        self.powers = torch.tensor(list(powers.values()), dtype=torch.float64)

    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        v, p = u.double()[..., None], self.powers
        return StreamTimes((v**p).to(u.dtype), (p * v ** (p - 1)).to(u.dtype))


def test_a_smooth_schedule_needs_one_method():
    schedule = Smooth({"texture": 2.0, "semantic": 1.0})
    validate(schedule)
    assert schedule.segments == ((0.0, 1.0),)
    assert schedule.first_time(0, 0.3, 0) == pytest.approx(0.3**0.5, abs=1e-15)
    assert schedule.first_time(1, 0.3, 0) == 0.3


def test_validate_refuses_falling_or_incomplete_maps():
    class Falling(Smooth):
        def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
            time, rate = super().at(u)
            return StreamTimes(time + 0.3 * torch.sin(6.283185307179586 * u)[..., None], rate)

    for wrong, message in [
        (PiecewiseLinear((0.0, 1.0), {"texture": (0.0, 0.5)}), "from time 0 to 1"),
        (Falling({"texture": 1.0}), "never fall"),
        (Smooth({"texture": 0.5}), "finite"),  # infinite at u = 0
    ]:
        with pytest.raises(SFDError, match=message):
            validate(wrong)


def test_a_registered_function_is_a_schedule(monkeypatch):
    def power(streams, *, exponent: float = 2.0) -> Schedule:
        return Smooth(dict.fromkeys(streams, exponent))

    power.__annotations__["exponent"] = float
    monkeypatch.setitem(SCHEDULES, "power", power)
    schedule = build_schedule({"name": "power", "exponent": 3.0}, STREAMS)
    assert schedule.spec == {"name": "power", "exponent": 3.0}
    assert schedule.at(torch.tensor(0.5)).time.tolist() == [0.125, 0.125]


TABLE = {"texture": [[0, 0], [1, 1]], "semantic": [[0, 0], [0.5, 1], [1, 1]]}


@pytest.mark.parametrize(
    "spec",
    [
        "ofset",
        {"name": "offset", "dleta": 0.3},
        {"name": "offset", "leaders": ["semantics"]},
        {"name": "offset", "leaders": []},
        {"name": "offset", "leaders": ["texture", "semantic"]},
        {"name": "table", "points": {"texture": [[0, 0], [1, 1]]}},
        {"name": "table", "points": TABLE | {"depth": [[0, 0], [1, 1]]}},
        {"name": "table", "points": TABLE | {"texture": [[0, 0.1], [1, 1]]}},
        {"name": "learned", "increments": {"texture": [1, 1]}},
        {"name": "learned", "increments": {"texture": [1, 1], "semantic": [1, 0], "depth": [1, 1]}},
        {"name": "learned", "increments": {"texture": [1, 1], "semantic": [1, 0, 1]}},
        {"name": "learned", "increments": {"texture": [1, 1], "semantic": [0, 0]}},
        {"name": "learned", "increments": {"texture": [1, 1], "semantic": [2, -1]}},
        {"name": "learned", "increments": {"texture": [1, 1], "semantic": [1, 1]}, "base": [1, 0]},
        {"name": "learned", "increments": {"texture": [1, 1], "semantic": [1, 1]}, "base": [1, 1e-12]},
        {"name": "learned", "increments": {}},
        {"name": "table", "points": TABLE | {"texture": [[0, 0], [0.5, 0.7], [0.6, 0.6], [1, 1]]}},
        {"name": "table", "points": TABLE | {"texture": [[0, 0], [0.5, 0.2], [0.5, 0.6], [1, 1]]}},
    ],
)
def test_wrong_settings_are_refused(spec):
    with pytest.raises(SFDError):
        build_schedule(spec, STREAMS)
