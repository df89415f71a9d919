"""Guidance is one line; the rest is about not paying for the weak model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfd.guidance import VelocityField, guide
from sfd.latents import CompositeLatent, Stream
from sfd.utils.errors import SFDError

COMPOSITE = CompositeLatent(
    streams=(Stream(name="texture", channels=3, grid=2), Stream(name="semantic", channels=2, grid=2))
)
HALF = torch.tensor([0.5, 0.5])


class Field:
    """A velocity that is linear in x and counts its calls."""

    def __init__(self, slope: float) -> None:
        self.slope = slope
        self.calls = 0

    def __call__(self, x: Tensor, times: Tensor) -> Tensor:
        self.calls += 1
        return self.slope * x + times.mean()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, COMPOSITE.size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def strong() -> Field:
    return Field(2.0)


@pytest.fixture
def weak() -> Field:
    return Field(-0.7)


@pytest.mark.parametrize("scale", [1, 1.0, {}, {"semantic": 1.0}, {"texture": 1.0, "semantic": 1.0}])
def test_scale_one_is_the_strong_model_itself(scale, strong, weak):
    assert guide(strong, weak, scale, COMPOSITE) is strong
    assert guide(strong, None, scale, COMPOSITE) is strong


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.5, 4.0])
def test_one_scale_extrapolates_all_streams(scale, x, strong, weak):
    v = guide(strong, weak, scale, COMPOSITE)(x, HALF)
    torch.testing.assert_close(v, weak(x, HALF) + scale * (strong(x, HALF) - weak(x, HALF)))


def test_a_scale_a_stream(x, strong, weak):
    v = COMPOSITE.unpack(guide(strong, weak, {"semantic": 1.9, "texture": 1.3}, COMPOSITE)(x, HALF))
    for name, g in {"semantic": 1.9, "texture": 1.3}.items():
        expected = COMPOSITE.unpack(torch.lerp(weak(x, HALF), strong(x, HALF), g))[name]
        torch.testing.assert_close(v[name], expected)


def test_a_stream_without_a_scale_gets_the_strong_velocity_exactly(x, strong, weak):
    v = COMPOSITE.unpack(guide(strong, weak, {"semantic": 3.0}, COMPOSITE)(x, HALF))
    assert torch.equal(v["texture"], COMPOSITE.unpack(strong(x, HALF))["texture"])
    assert not torch.equal(v["semantic"], COMPOSITE.unpack(strong(x, HALF))["semantic"])


def test_scales_are_not_rounded_to_a_networks_dtype(x):
    def half(slope: float) -> VelocityField:
        return lambda x, times: (slope * x).bfloat16()

    v = guide(half(2.0), half(-0.7), 1.9, COMPOSITE)(x, HALF)
    torch.testing.assert_close(v, torch.lerp((-0.7 * x).bfloat16().float(), (2.0 * x).bfloat16().float(), 1.9))


def test_intervals_are_on_each_streams_own_time(x, strong, weak):
    scale, interval = {"semantic": 2.0, "texture": 3.0}, {"semantic": (0.0, 0.5), "texture": (0.25, 0.75)}
    guided = guide(strong, weak, scale, COMPOSITE, interval)
    for texture, semantic in [(0.0, 0.3), (0.25, 0.5), (0.5, 0.8), (0.8, 1.0)]:
        times = torch.tensor([texture, semantic])
        v = COMPOSITE.unpack(guided(x, times))
        for name, g, inside in [("texture", 3.0, 0.25 <= texture <= 0.75), ("semantic", 2.0, semantic <= 0.5)]:
            expected = torch.lerp(weak(x, times), strong(x, times), g if inside else 1.0)
            assert torch.equal(v[name], COMPOSITE.unpack(expected)[name])


def test_the_weak_model_is_called_inside_intervals_only(x, strong, weak):
    guided = guide(strong, weak, {"semantic": 2.0}, COMPOSITE, {"semantic": (0.2, 0.6)})
    outside = [torch.tensor([0.4, s]) for s in (0.0, 0.1, 0.7, 1.0)]
    for times in outside:
        assert torch.equal(guided(x, times), 2.0 * x + times.mean())
    assert weak.calls == 0
    guided(x, torch.tensor([0.0, 0.4]))
    assert weak.calls == 1


def test_one_interval_for_all_streams(x, strong, weak):
    guided = guide(strong, weak, 2.0, COMPOSITE, (0.5, 1.0))
    guided(x, torch.tensor([0.1, 0.4]))
    assert weak.calls == 0
    guided(x, torch.tensor([0.1, 0.5]))
    assert weak.calls == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": {"semantics": 2.0}}, "'semantics'; did you mean 'semantic'"),
        ({"scale": -1.0}, "at least 0, got -1.0"),
        ({"scale": {"texture": math.nan}}, "'texture' must be finite"),
        ({"scale": 2.0, "interval": {"txture": (0.0, 1.0)}}, "'txture'; did you mean 'texture'"),
        ({"scale": 2.0, "interval": (0.6, 0.4)}, "got 0.6 to 0.4"),
        ({"scale": 2.0, "interval": {"texture": (0.0, 1.5)}}, "got 0.0 to 1.5"),
    ],
)
def test_mistakes_are_explained(arguments, message, strong, weak):
    with pytest.raises(SFDError, match=message):
        guide(strong, weak, composite=COMPOSITE, **arguments)


def test_guidance_without_a_weak_model_is_refused(strong):
    with pytest.raises(SFDError, match="needs a weak model"):
        guide(strong, None, 1.5, COMPOSITE)


def test_a_stream_at_rest_needs_no_guidance(x, strong, weak):
    """Only semantics are guided; while they stand still the weak model is not asked."""
    guided = guide(strong, weak, {"semantic": 2.0}, COMPOSITE)
    guided.begin([True, False])
    assert torch.equal(guided(x, HALF), strong(x, HALF))
    assert weak.calls == 0
    guided.begin([False, True])
    guided(x, HALF)
    assert weak.calls == 1


def test_a_piece_decides_who_is_guided_whatever_the_times(x, strong, weak):
    """Within it both ends see the limit from inside."""
    guided = guide(strong, weak, 2.0, COMPOSITE, {"texture": (0.2, 0.5), "semantic": (0.5, 1.0)})
    guided.begin([True, True], [0.4, 0.45])
    for times in (HALF, HALF + 0.1, torch.tensor([[0.1, 0.9]] * 4)):
        v = COMPOSITE.unpack(guided(x, times))
        assert torch.equal(v["semantic"], COMPOSITE.unpack(strong(x, times))["semantic"])
        expected = torch.lerp(weak(x, times), strong(x, times), 2.0)
        assert torch.equal(v["texture"], COMPOSITE.unpack(expected)["texture"])
    calls = weak.calls
    guided.begin([True, True], [0.7, 0.2])
    assert torch.equal(guided(x, HALF), strong(x, HALF))
    guided.begin([False, True], [0.4, 0.2])
    assert torch.equal(guided(x, HALF), strong(x, HALF))
    assert weak.calls == calls


def test_it_jumps_where_intervals_of_guided_streams_end(strong, weak):
    def jumps(scale, interval) -> list[tuple[float, ...]]:
        return guide(strong, weak, scale, COMPOSITE, interval).jumps

    assert jumps(2.0, None) == jumps(2.0, (0.0, 1.0)) == jumps(2.0, (0.5, 0.5)) == [(), ()]
    assert jumps(2.0, {"texture": (0.0, 0.3), "semantic": (0.1, 0.7)}) == [(0.3,), (0.1, 0.7)]
    assert jumps({"semantic": 2.0}, (0.1, 1.0)) == [(), (0.1,)]


def test_each_image_may_have_its_own_times(x):
    times = torch.tensor([[0.1, 0.6], [0.1, 0.2], [0.9, 0.9], [0.5, 0.4]])
    guided = guide(lambda x, times: 2.0 * x, lambda x, times: -0.7 * x, 2.0, COMPOSITE, (0.5, 1.0))
    alone = torch.cat([guided(x[k : k + 1], times[k]) for k in range(4)])
    torch.testing.assert_close(guided(x, times), alone)


class Line:
    """A velocity that is linear in time, the same everywhere."""

    def __init__(self, slope: float) -> None:
        self.slope = slope
        self.calls = 0

    def __call__(self, x: Tensor, times: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(x, 1.0 + self.slope * times.sum().item())


@pytest.mark.parametrize("between", ["hold", "extrapolate"])
def test_the_weak_velocity_is_reused(between, x):
    """v_c − v_w = 3·Σt: extrapolation is exact from the third on, holding lags."""
    strong, weak = Line(2.0), Line(-1.0)
    guided = guide(strong, weak, 3.0, COMPOSITE, weak_every=3, weak_between=between)
    for k in range(9):
        v = guided(x, torch.tensor([0.05 * k, 0.05 * k]))
        seen = 0.1 * k if between == "extrapolate" and k > 3 else 0.1 * (k // 3 * 3)
        torch.testing.assert_close(v, torch.full_like(v, 1 + 2 * 0.1 * k + 2 * 3 * seen))
    assert (strong.calls, weak.calls) == (9, 3)
    assert guided.weak_evaluations == 3


def test_nothing_is_reused_across_a_knot_or_an_interval(x):
    weak = Line(-1.0)
    guided = guide(Line(2.0), weak, 3.0, COMPOSITE, (0.0, 0.5), weak_every=10)
    guided(x, HALF)
    guided(x, HALF)
    assert weak.calls == 1
    guided.begin([True, True])
    guided(x, HALF)
    assert weak.calls == 2
    guided(x, HALF + 0.1)
    guided(x, HALF)
    assert weak.calls == 3


def test_a_pair_is_asked_in_place_of_both(x, strong, weak):
    plain = guide(strong, weak, 1.5, COMPOSITE)(x, HALF)
    calls = strong.calls, weak.calls
    paired = guide(
        strong, weak, 1.5, COMPOSITE, pair=lambda x, times: (2.0 * x + times.mean(), -0.7 * x + times.mean())
    )
    assert torch.equal(paired(x, HALF), plain)
    assert (strong.calls, weak.calls) == calls


def test_the_weak_model_every_no_calls_is_refused(strong, weak):
    with pytest.raises(SFDError, match="every 1 or more calls, got 0"):
        guide(strong, weak, 1.5, COMPOSITE, weak_every=0)
