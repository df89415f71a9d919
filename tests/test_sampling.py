"""The sampler on exact flows: each solver's order across knots, streams at rest, and stochastic sampling."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from helpers.exact_flow import COMPOSITE, ORDERS, STREAMS, check_order, mixture, order
from sfd.guidance import VelocityField
from sfd.sampling import Progress, initial_noise, integrate
from sfd.schedule import Schedule, StreamTimes, build_schedule
from sfd.utils.errors import SFDError

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


@functools.cache
def reference(spec: str) -> Tensor:
    """Where the mixture of three carries the noise by a schedule, to twelve digits."""
    noise = initial_noise(range(8), COMPOSITE).double()
    schedule = build_schedule(json.loads(spec), STREAMS)
    return integrate(mixture(3).velocity, noise, schedule, COMPOSITE, solver="dopri5", options=TIGHT).x


def errors(velocity: VelocityField, noise: Tensor, schedule: Schedule, exact: Tensor, **how) -> Callable[[int], float]:
    """Mean error of a sampling as a function of the number of steps."""

    def error(steps: int) -> float:
        x = integrate(velocity, noise, schedule, COMPOSITE, steps=steps, **how).x
        return (x - exact).abs().mean().item()

    return error


@pytest.mark.parametrize("name", ORDERS)
def test_a_time_shift_keeps_the_solvers_order(name, offset, noise):
    data = mixture(1)
    check_order(errors(data.velocity, noise, offset, data.transport(noise), shift=0.6, **ORDERS[name][0]), name)


@pytest.mark.parametrize("name", ["heun", "multistep 2", "multistep 3"])
def test_the_solvers_order_on_a_mixture(name, schedule, noise):
    exact = reference(json.dumps(schedule.spec))
    check_order(errors(mixture(3).velocity, noise, schedule, exact, **ORDERS[name][0]), name)


def test_a_multistep_method_corrects_its_last_step_before_a_knot(offset, noise):
    """With v = t and one step per interval: the trapezoidal rule, but Euler's where a stream's steps end."""
    x = integrate(lambda x, t: COMPOSITE.per_entry(t).expand_as(x), noise, offset, COMPOSITE, steps=3).x
    moved = COMPOSITE.unpack(x - noise)
    for name, expected in {"texture": 0.7**2 / 2 + 0.3 * 0.7, "semantic": 0.3**2 / 2 + 0.7 * 0.3}.items():
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], expected))


def test_sde_without_noise_is_heun(schedule, noise):
    how = {"steps": 24, "seeds": range(8)}
    heun = integrate(mixture(3).velocity, noise, schedule, COMPOSITE, solver="heun", **how).x
    sde = integrate(mixture(3).velocity, noise, schedule, COMPOSITE, solver="sde", options={"noise": 0.0}, **how).x
    assert torch.equal(heun, sde)


class Smooth(Schedule):
    """Texture lags by a square, so rates vary within the one segment."""

    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        return StreamTimes(torch.stack([u**2, u], dim=-1), torch.stack([2 * u, torch.ones_like(u)], dim=-1))


def test_the_solvers_order_on_a_smooth_schedule(noise):
    data = mixture(1)
    error = errors(data.velocity, noise, Smooth(STREAMS), data.transport(noise), solver="heun")
    assert order(error, 60) == pytest.approx(2, abs=0.12)


def test_dopri5_reaches_its_tolerance(schedule, noise):
    data, rtol = mixture(1), 1e-6
    options = {"rtol": rtol, "atol": rtol / 10}
    x = integrate(data.velocity, noise, schedule, COMPOSITE, solver="dopri5", options=options).x
    assert (x - data.transport(noise)).abs().max() < 30 * rtol  # errors of a dozen steps add up


def test_heun_across_knots_loses_its_order(noise, offset):
    data = mixture(1)
    exact = data.transport(noise)
    stopping = errors(data.velocity, noise, offset, exact, solver="heun")
    blind = errors(data.velocity, noise, offset, exact, solver="heun", knots=False)
    assert order(blind, 60) < 1.3
    assert blind(100) > 50 * stopping(100)


def sde(noise: Tensor, seeds: Sequence[int] | None, amount: float = 1.0) -> Tensor:
    schedule, options = build_schedule("offset", STREAMS), {"noise": amount}
    velocity = mixture(2).velocity
    return integrate(velocity, noise, schedule, COMPOSITE, solver="sde", steps=24, options=options, seeds=seeds).x


def test_noise_of_the_sde_depends_on_seed_and_step_alone():
    seeds = [5, 0, 17, 3]
    start = initial_noise(seeds, COMPOSITE).double()
    whole = sde(start, seeds)
    torch.testing.assert_close(sde(start[2:], seeds[2:]), whole[2:], rtol=0, atol=1e-13)
    assert not torch.allclose(sde(start, [5, 0, 17, 4])[3], whole[3], atol=0.01)
    with pytest.raises(SFDError, match="no seeds"):
        sde(start, None)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "sde", "dopri5"])
def test_a_stream_at_rest_does_not_change(solver, noise, offset):
    first, last = offset.knots
    seen: list[Progress] = []
    how = {"solver": solver, "steps": 13, "seeds": range(8), "callback": seen.append}
    integrate(mixture(3).velocity, noise, offset, COMPOSITE, **how)
    arrived = next(p.x for p in seen if p.u == last)
    for p in seen:
        if p.u <= first:
            assert torch.equal(COMPOSITE.unpack(p.x)["texture"], COMPOSITE.unpack(noise)["texture"])
        if p.u >= last:
            assert torch.equal(COMPOSITE.unpack(p.x)["semantic"], COMPOSITE.unpack(arrived)["semantic"])
    assert not torch.equal(COMPOSITE.unpack(seen[-1].x)["texture"], COMPOSITE.unpack(noise)["texture"])


def test_the_velocity_of_a_stream_at_rest_may_be_nan(noise):
    data, schedule = mixture(1), build_schedule("sequential", STREAMS)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        waiting = COMPOSITE.per_entry(torch.tensor([t[1].item() < 1, False]))
        return data.velocity(x, t).masked_fill(waiting, torch.nan)

    x = integrate(velocity, noise, schedule, COMPOSITE, solver="heun", steps=40).x
    torch.testing.assert_close(x, integrate(data.velocity, noise, schedule, COMPOSITE, solver="heun", steps=40).x)


def test_the_callback_gets_times_states_and_nfe(noise, offset):
    seen: list[Progress] = []
    result = integrate(mixture(1).velocity, noise, offset, COMPOSITE, solver="heun", steps=10, callback=seen.append)
    assert len(seen) == 10
    assert set(offset.knots) <= {p.u for p in seen}
    assert [p.nfe for p in seen] == list(range(2, 21, 2))
    assert result.nfe == 20
    assert torch.equal(seen[-1].x, result.x)
    for p in seen:
        torch.testing.assert_close(p.t, offset.at(torch.tensor(p.u, dtype=torch.float64)).time)


def test_a_segment_in_which_no_stream_moves_takes_no_evaluation(noise):
    schedule = build_schedule({"name": "offset", "delta": 3.0}, STREAMS)
    assert len(schedule.segments) == 3
    assert integrate(mixture(1).velocity, noise, schedule, COMPOSITE, solver="euler", steps=2).nfe == 2


@pytest.mark.parametrize(("solver", "each"), [("euler", 1), ("heun", 2), ("sde", 2), ("multistep", 1)])
def test_nfe_per_step(solver, each, noise, offset):
    how = {"solver": solver, "steps": 17, "seeds": range(8)}
    assert integrate(mixture(1).velocity, noise, offset, COMPOSITE, **how).nfe == each * 17


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 2},  # fewer than the schedule's three segments
        {"shift": 0.0},
        {"noise": torch.zeros(2, 5)},
        {"seeds": [1]},
        {"schedule": build_schedule("synchronous", ("semantic", "texture"))},
        {"schedule": build_schedule("synchronous", ("texture",))},
    ],
)
def test_mismatched_arguments_are_refused(wrong):
    defaults = {"noise": torch.zeros(2, 6), "schedule": build_schedule("offset", STREAMS)}
    with pytest.raises(SFDError):
        integrate(mixture(1).velocity, latent=COMPOSITE, **(defaults | wrong))
