"""Each solver on equations with known solutions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfd import solvers
from sfd.sampling import find_solver
from sfd.solvers import SOLVERS, adams_weights, dopri5
from sfd.utils.errors import SFDError

START = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


def decay(u: float, x: Tensor) -> Tensor:
    """dx/du = −2u·x, so x(u) = x(0)·exp(−u²)."""
    return -2 * u * x


def solve(name, dxdu, steps, callback=None, start=START, **options) -> Tensor:
    """Solve from 0 to 1; a stochastic solver moves back without noise."""
    solver = SOLVERS[name]
    grid = [0.0, 1.0] if solver.adaptive else [k / steps for k in range(steps + 1)]
    churn = [lambda x, u, earlier: x - (u - earlier) * dxdu(u, x)] if solver.stochastic else []
    return solver.solve(dxdu, start, grid, callback, *churn, **options)


@pytest.mark.parametrize("name", SOLVERS)
def test_constant_velocity_is_exact(name):
    x = solve(name, lambda u, x: torch.full_like(x, 3.0), 4)
    torch.testing.assert_close(x, START + 3, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", [2, 3])
def test_multistep_integrates_polynomials_through_uneven_steps(order):
    uneven = [0.0, 1e-9, 0.1, 0.15, 0.5, 0.58, 1.0]
    x = solvers.multistep(lambda u, x: torch.full_like(x, order * u ** (order - 1)), START, uneven, order=order)
    torch.testing.assert_close(x, START + 1, rtol=0, atol=1e-12)


@given(st.integers(1, 4), st.lists(st.floats(0.1, 1), min_size=5, max_size=5), st.floats(-5, 5))
def test_adams_weights_integrate_polynomials(count, gaps, origin):
    nodes = tuple(origin + sum(gaps[:k]) for k in range(count))
    start, end = nodes[-1], nodes[-1] + gaps[4]
    weights = adams_weights(nodes, start, end)
    for power in range(count):
        integral = ((end - origin) ** (power + 1) - (start - origin) ** (power + 1)) / (power + 1)
        total = sum(w * (u - origin) ** power for w, u in zip(weights, nodes, strict=True))
        assert total == pytest.approx(integral, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
def test_dopri5_keeps_its_tolerance(rtol):
    error = (dopri5(decay, START, [0.0, 1.0], rtol=rtol, atol=rtol / 10) - START / math.e).abs().max().item()
    assert error < 3 * rtol


def test_dopri5_does_not_evaluate_beyond_the_end():
    def kinked(u: float, x: Tensor) -> Tensor:
        return x if u <= 1 + 1e-12 else 1e3 * x

    error = (dopri5(kinked, START, [0.0, 1.0], rtol=1e-6, atol=1e-8) - START * math.e).abs().max().item()
    assert error < 1e-5


@pytest.mark.parametrize("name", SOLVERS)
def test_the_callback_gets_every_step_and_the_input_is_unchanged(name):
    seen: list[tuple[float, Tensor]] = []
    start = START.clone()
    x = solve(name, decay, 5, lambda u, x: seen.append((u, x)), start=start)
    at = [u for u, _ in seen]
    assert at == sorted(set(at)) and at[0] > 0 and at[-1] == 1
    assert torch.equal(seen[-1][1], x) and torch.equal(start, START)
    for u, state in seen:
        torch.testing.assert_close(state, START * math.exp(-(u**2)), rtol=0, atol=0.3)


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of all new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {t.dtype for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result


def test_dopri5_makes_no_float64_on_devices_without(monkeypatch):
    start, ends = START.float(), [0.3 / 1.3, 1 / 1.3]
    with Dtypes() as dtypes:
        expected = dopri5(decay, start, ends)
    assert torch.float64 in dtypes.seen
    monkeypatch.setattr(solvers, "WITHOUT_FLOAT64", {"cpu"})
    seen: list[float] = []
    with Dtypes() as dtypes:
        x = dopri5(decay, start, ends, lambda u, x: seen.append(u))
    assert torch.float64 not in dtypes.seen
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    assert seen == sorted(set(seen)) and seen[0] > ends[0] + 1e-6 and seen[-1] == ends[1]


def test_dopri5_fails_with_one_sentence_on_nan():
    with pytest.raises(SFDError, match="dopri5 cannot continue"):
        dopri5(lambda u, x: x * float("nan"), START, [0.0, 1.0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("huen", {}, "heun"), ("dopri5", {"rtol": 0}, "greater than 0"), ("dopri5", {"rtoll": 1e-3}, "'rtol'")],
)
def test_unknown_names_and_options_are_refused(name, options, message):
    with pytest.raises(SFDError, match=message):
        find_solver(name, options)
