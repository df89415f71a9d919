"""Guidance is one line; the rest is about not paying for the weak model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfd.errors import SFDError
from sfd.guidance import VelocityField, guide
from sfd.streams import Composite, Stream

COMPOSITE = Composite(streams=(Stream(name="texture", channels=3, grid=2), Stream(name="semantic", channels=2, grid=2)))
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
    v = COMPOSITE.split(guide(strong, weak, {"semantic": 1.9, "texture": 1.3}, COMPOSITE)(x, HALF))
    for name, g in {"semantic": 1.9, "texture": 1.3}.items():
        expected = COMPOSITE.split(torch.lerp(weak(x, HALF), strong(x, HALF), g))[name]
        torch.testing.assert_close(v[name], expected)


def test_a_stream_without_a_scale_gets_the_strong_velocity_exactly(x, strong, weak):
    v = COMPOSITE.split(guide(strong, weak, {"semantic": 3.0}, COMPOSITE)(x, HALF))
    assert torch.equal(v["texture"], COMPOSITE.split(strong(x, HALF))["texture"])
    assert not torch.equal(v["semantic"], COMPOSITE.split(strong(x, HALF))["semantic"])


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
        v = COMPOSITE.split(guided(x, times))
        for name, g, inside in [("texture", 3.0, 0.25 <= texture <= 0.75), ("semantic", 2.0, semantic <= 0.5)]:
            expected = torch.lerp(weak(x, times), strong(x, times), g if inside else 1.0)
            assert torch.equal(v[name], COMPOSITE.split(expected)[name])


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
