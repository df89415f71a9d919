"""The exact velocity of a Gaussian mixture is the conditional expectation E[x1 − x0 | x]."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfd.latents import CompositeLatent, Stream
from sfd.models.toy import GaussianMixture

PAIR = CompositeLatent(
    streams=(Stream(name="texture", channels=1, grid=1), Stream(name="semantic", channels=1, grid=1))
)


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def mixture() -> GaussianMixture:
    """Two components whose streams are dependent."""
    return GaussianMixture(PAIR, double(0.3, 0.7), double([-1.5, 1.0], [1.0, -0.5]), double([0.3, 0.5], [0.6, 0.2]))


def by_integration(mixture: GaussianMixture, x: Tensor, times: Tensor) -> Tensor:
    """E[x1 − x0 | x] for one x (2,) by summing over data on a fine grid; noise follows, x0 = (x − t·x1) / (1 − t)."""
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    x1 = torch.cartesian_prod(axis, axis)
    x0 = (x - times * x1) / (1 - times)
    density = torch.zeros(len(x1), dtype=torch.float64)
    for w, m, s in zip(mixture.weights, mixture.means, mixture.stds, strict=True):
        density += w * torch.exp(-0.5 * (((x1 - m) / s) ** 2).sum(dim=1)) / s.prod()
    density *= torch.exp(-0.5 * (x0**2).sum(dim=1))
    return (density[:, None] * (x1 - x0)).sum(dim=0) / density.sum()


@pytest.mark.parametrize("times", [(0.0, 0.0), (0.0, 0.3), (0.7, 0.7), (0.6, 0.9)])
def test_velocity_is_the_conditional_expectation(times, mixture):
    x = double([0.2, -0.4], [-1.0, 0.8], [1.3, 0.1])
    expected = torch.stack([by_integration(mixture, row, double(*times)) for row in x])
    torch.testing.assert_close(mixture.velocity(x, double(*times)), expected, rtol=1e-7, atol=1e-7)


def test_transport_solves_the_flow(mixture):
    """The derivative of t ↦ t·m + √V·x0 is the velocity."""
    one = mixture.component(0)
    noise, t, h = double([0.7, -1.1]), 0.4, 1e-5

    def path(t: float) -> Tensor:
        return t * one.means + (t**2 * one.stds**2 + (1 - t) ** 2).sqrt() * noise

    torch.testing.assert_close(path(1.0), one.transport(noise))
    slope = (path(t + h) - path(t - h)) / (2 * h)
    torch.testing.assert_close(one.velocity(path(t), double(t, t)), slope, rtol=1e-8, atol=1e-8)


def test_each_image_may_have_its_own_times(mixture):
    x, times = double([0.2, -0.4], [-1.0, 0.8]), double([0.1, 0.4], [0.6, 0.9])
    alone = torch.cat([mixture.velocity(x[k : k + 1], times[k]) for k in range(2)])
    torch.testing.assert_close(mixture.velocity(x, times), alone)
