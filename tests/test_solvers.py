"""Each solver alone, on equations with known solutions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfd.solvers import check_steps, dopri5, load_solver
from sfd.solvers.multistep import adams_weights
from sfd.utils.errors import SFDError
from sfd.utils.registry import names

SOLVERS = names("sfd.solvers")
START = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


def decay(u: float, x: Tensor) -> Tensor:
    """dx/du = −2u·x, so x(u) = x(0)·exp(−u²)."""
    return -2 * u * x


class Still:
    """A velocity that is led back without noise, for solvers that draw some."""

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, u, x, moving=None):
        return self.velocity(u, x)

    def renoise(self, x: Tensor, u: float, earlier: float) -> Tensor:
        return x - (u - earlier) * self(u, x)


def points(name: str, steps: int) -> list[float]:
    adaptive = load_solver(name)[0].ADAPTIVE
    return [0.0, 1.0] if adaptive else [k / steps for k in range(steps + 1)]


@pytest.mark.parametrize("name", SOLVERS)
def test_constant_velocity_is_exact(name):
    solver, options = load_solver(name)
    x = solver.solve(Still(lambda u, x: torch.full_like(x, 3.0)), START, points(name, 4), options)
    torch.testing.assert_close(x, START + 3, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "given", "order"),
    [("euler", {}, 1), ("heun", {}, 2), ("multistep", {"order": 2}, 2), ("multistep", {"order": 3}, 3)],
)
def test_order(name, given, order):
    solver, options = load_solver(name, given)

    def error(steps: int) -> float:
        return (solver.solve(decay, START, points(name, steps), options) - START / math.e).abs().max().item()

    assert math.log2(error(1024) / error(2048)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("order", [2, 3])
def test_multistep_integrates_polynomials_through_uneven_steps(order):
    """What it interpolates exactly, it integrates exactly; the first step alone is the trapezoidal rule's."""
    solver, options = load_solver("multistep", {"order": order})
    uneven = [0.0, 1e-9, 0.1, 0.15, 0.5, 0.58, 1.0]
    x = solver.solve(lambda u, x: torch.full_like(x, order * u ** (order - 1)), START, uneven, options)
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
    solver, options = load_solver("dopri5", {"rtol": rtol, "atol": rtol / 10})
    error = (solver.solve(decay, START, [0.0, 1.0], options) - START / math.e).abs().max().item()
    assert error < 3 * rtol


def test_dopri5_defaults_are_the_published_ones():
    assert load_solver("dopri5")[1].model_dump() == {"rtol": 1e-3, "atol": 1e-6, "control": "batch"}


def stiffness(u, x: Tensor, moving=None) -> Tensor:
    """Each image decays at its own rate, to the image's second entry."""
    return torch.stack([-x[:, 1] * x[:, 0], torch.zeros(len(x), dtype=x.dtype)], dim=1)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("control", ["worst", "image"])
def test_every_image_keeps_the_tolerance(control, rtol):
    """Ninety-nine easy images and a hard one, which the batch's mean would hide."""
    start = torch.tensor([[1.0, 1.0]] * 99 + [[1.0, 8.0]], dtype=torch.float64)
    solver, options = load_solver("dopri5", {"rtol": rtol, "atol": rtol / 10, "control": control})
    x = solver.solve(stiffness, start, [0.0, 1.0], options)
    assert (x[:, 0] - torch.exp(-start[:, 1])).abs().max() < 5 * rtol


def test_an_image_with_steps_of_its_own_does_not_feel_the_others():
    solver, options = load_solver("dopri5", {"rtol": 1e-4, "control": "image"})
    start = torch.tensor([[1.0, 0.5], [2.0, 9.0], [-1.0, 3.0]], dtype=torch.float64)
    alone = torch.cat([solver.solve(stiffness, start[k : k + 1], [0.2, 0.9], options) for k in range(3)])
    assert torch.equal(solver.solve(stiffness, start, [0.2, 0.9], options), alone)


def test_an_image_with_steps_of_its_own_counts_them():
    """An image that has arrived is no longer marked as moving, and stays where it is."""
    counts = torch.zeros(2, dtype=torch.int64)

    def counted(u, x, moving):
        assert ((u >= 0) & (u <= 1)).all()
        counts.add_(moving)
        return stiffness(u, x)

    solver, options = load_solver("dopri5", {"rtol": 1e-6, "control": "image"})
    solver.solve(counted, torch.tensor([[1.0, 0.1], [1.0, 9.0]], dtype=torch.float64), [0.0, 1.0], options)
    assert 2 * counts[0] < counts[1]
    assert all((count - 2) % 6 == 0 for count in counts.tolist())  # two to begin, six a step


def test_dopri5_does_not_feel_what_lies_beyond_the_end():
    def kinked(u: float, x: Tensor) -> Tensor:
        return x if u <= 1 + 1e-12 else 1e3 * x

    solver, options = load_solver("dopri5", {"rtol": 1e-6, "atol": 1e-8})
    error = (solver.solve(kinked, START, [0.0, 1.0], options) - START * math.e).abs().max().item()
    assert error < 1e-5


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_reports_every_step_up_to_the_end(name):
    solver, options = load_solver(name)
    seen: list[tuple[float, Tensor]] = []
    x = solver.solve(Still(decay), START, points(name, 5), options, lambda u, x: seen.append((u, x)))
    at = [u for u, _ in seen]
    assert at == sorted(set(at))
    assert at[0] > 0
    assert at[-1] == 1
    assert torch.equal(seen[-1][1], x)
    for u, state in seen:
        torch.testing.assert_close(state, START * math.exp(-(u**2)), rtol=0, atol=0.3)


@pytest.mark.parametrize("name", SOLVERS)
def test_input_is_not_written_to(name):
    solver, options = load_solver(name)
    start = START.clone()
    solver.solve(Still(decay), start, points(name, 3), options)
    assert torch.equal(start, START)


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {t.dtype for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result


def test_dopri5_keeps_times_in_float64():
    solver, options = load_solver("dopri5")
    with Dtypes() as dtypes:
        solver.solve(decay, START.float(), [0.0, 1.0], options)
    assert torch.float64 in dtypes.seen


def test_dopri5_makes_no_float64_on_devices_without(monkeypatch):
    solver, options = load_solver("dopri5")
    start, ends = START.float(), [0.3 / 1.3, 1 / 1.3]
    expected = solver.solve(decay, start, ends, options)
    monkeypatch.setattr(dopri5, "WITHOUT_FLOAT64", {"cpu"})
    seen: list[float] = []
    with Dtypes() as dtypes:
        x = solver.solve(decay, start, ends, options, lambda u, x: seen.append(u))
    assert torch.float64 not in dtypes.seen
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    assert seen == sorted(set(seen)) and seen[0] > ends[0] + 1e-6 and seen[-1] == ends[1]


@pytest.mark.parametrize("control", ["batch", "worst", "image"])
def test_dopri5_says_when_it_cannot_go_on(control):
    solver, options = load_solver("dopri5", {"control": control})
    with pytest.raises(SFDError, match="dopri5 cannot go on"):
        solver.solve(lambda u, x, moving=None: x * float("nan"), START, [0.0, 1.0], options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("huen", {}, "no solver 'huen'; did you mean 'heun'"),
        ("dopri5", {"rtoll": 1e-3}, "no field 'rtoll'; did you mean 'rtol'"),
        ("dopri5", {"rtol": 0}, "'rtol': Input should be greater than 0"),
        ("euler", {"rtol": 1e-3}, "no field 'rtol'"),
        ("multistep", {"order": 4}, "'order': Input should be less than or equal to 3, but 4"),
    ],
)
def test_wrong_names_are_explained(name, options, message):
    with pytest.raises(SFDError, match=message):
        load_solver(name, options)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("dopri5", 50, "chooses its own steps, but 50"),
        ("heun", None, "needs a number of steps, at least 3"),
        ("heun", 0, "at least 1, got 0"),
        ("heun", 2, "steps end at the knots, and each of the 3 pieces between needs one, but 2"),
    ],
)
def test_a_step_count_must_fit(name, steps, message):
    with pytest.raises(SFDError, match=message):
        check_steps(load_solver(name)[0], name, steps, least=3, stops="the knots")
