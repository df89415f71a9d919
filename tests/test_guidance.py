"""Guidance: scales and intervals per stream, and when the guiding model is not called."""

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
        self.slope, self.calls = slope, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.slope * x + t.mean()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, COMPOSITE.size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cond() -> Field:
    return Field(2.0)


@pytest.fixture
def guiding() -> Field:
    return Field(-0.7)


@pytest.mark.parametrize("scale", [1, 1.0, {}, {"semantic": 1.0}, {"texture": 1.0, "semantic": 1.0}])
def test_scale_one_returns_the_conditional_velocity(scale, cond, guiding):
    assert guide(cond, guiding, scale, COMPOSITE) is cond
    assert guide(cond, None, scale, COMPOSITE) is cond


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.5, 4.0])
def test_one_scale_guides_all_streams(scale, x, cond, guiding):
    v = guide(cond, guiding, scale, COMPOSITE)(x, HALF)
    torch.testing.assert_close(v, guiding(x, HALF) + scale * (cond(x, HALF) - guiding(x, HALF)))


def test_scales_are_per_stream_and_exact_at_one(x, cond, guiding):
    v = COMPOSITE.unpack(guide(cond, guiding, {"semantic": 1.9}, COMPOSITE)(x, HALF))
    expected = COMPOSITE.unpack(torch.lerp(guiding(x, HALF), cond(x, HALF), 1.9))
    torch.testing.assert_close(v["semantic"], expected["semantic"])
    assert torch.equal(v["texture"], COMPOSITE.unpack(cond(x, HALF))["texture"])


def test_scales_are_applied_in_float32(x):
    def half(slope: float) -> VelocityField:
        return lambda x, t: (slope * x).bfloat16()

    v = guide(half(2.0), half(-0.7), 1.9, COMPOSITE)(x, HALF)
    torch.testing.assert_close(v, torch.lerp((-0.7 * x).bfloat16().float(), (2.0 * x).bfloat16().float(), 1.9))


def test_a_smooth_interval_fixes_which_streams_are_guided(x, cond, guiding):
    """Both of its ends see the limit from inside; a stream at rest needs no guidance."""
    guided = guide(cond, guiding, 2.0, COMPOSITE, {"texture": (0.2, 0.5), "semantic": (0.5, 1.0)})
    inside = guided.on_interval([True, True], [0.4, 0.45])
    for t in (HALF, HALF + 0.1):
        v = COMPOSITE.unpack(inside(x, t))
        assert torch.equal(v["semantic"], COMPOSITE.unpack(cond(x, t))["semantic"])
        assert torch.equal(v["texture"], COMPOSITE.unpack(torch.lerp(guiding(x, t), cond(x, t), 2.0))["texture"])
    assert guided.on_interval([True, True], [0.7, 0.2]) is cond
    assert guided.on_interval([False, True], [0.4, 0.2]) is cond


def test_discontinuities_are_the_ends_of_guided_streams_intervals(cond, guiding):
    def ends(scale, interval) -> list[tuple[float, ...]]:
        return guide(cond, guiding, scale, COMPOSITE, interval).discontinuities

    assert ends(2.0, None) == ends(2.0, (0.0, 1.0)) == ends(2.0, (0.5, 0.5)) == [(), ()]
    assert ends(2.0, {"texture": (0.0, 0.3), "semantic": (0.1, 0.7)}) == [(0.3,), (0.1, 0.7)]
    assert ends({"semantic": 2.0}, (0.1, 1.0)) == [(), (0.1,)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": {"semantics": 2.0}},
        {"scale": {"texture": math.nan}},
        {"scale": 2.0, "interval": {"txture": (0.0, 1.0)}},
        {"scale": 2.0, "interval": (0.6, 0.4)},
        {"scale": 1.5, "guiding": None},
    ],
)
def test_wrong_settings_are_refused(arguments, cond, guiding):
    with pytest.raises(SFDError):
        guide(cond, latent=COMPOSITE, **({"guiding": guiding} | arguments))
