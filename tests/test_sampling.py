"""The sampler against exact flows: at each solver's order across knots, and against the published sampler's numbers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.exact_flow import COMPOSITE, ORDERS, SCHEDULES, STREAMS, check_order, mixture, order
from sfd.convert import transformer as interop
from sfd.guidance import VelocityField
from sfd.latents import CompositeLatent
from sfd.models.dit import LightningDiT
from sfd.sampling import Progress, initial_noise, integrate
from sfd.schedule import Schedule, StreamTimes, build_schedule
from sfd.utils.errors import SFDError
from small_published import published_config

GOLDEN = Path(__file__).parent / "golden"
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return build_schedule(SCHEDULES[request.param], STREAMS)


@pytest.fixture
def offset() -> Schedule:
    return build_schedule("offset", STREAMS)


@pytest.fixture
def noise() -> Tensor:
    return initial_noise(range(8), COMPOSITE).double()


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
def test_one_gaussian_at_the_solvers_order(name, schedule, noise):
    data = mixture(1)
    check_order(errors(data.velocity, noise, schedule, data.transport(noise), **ORDERS[name][0]), name)


@pytest.mark.parametrize("name", ORDERS)
def test_a_time_shift_keeps_the_order(name, offset, noise):
    data = mixture(1)
    check_order(errors(data.velocity, noise, offset, data.transport(noise), shift=0.6, **ORDERS[name][0]), name)


@pytest.mark.parametrize("name", ORDERS)
def test_mixture_at_the_solvers_order(name, schedule, noise):
    exact = reference(json.dumps(schedule.spec))
    check_order(errors(mixture(3).velocity, noise, schedule, exact, **ORDERS[name][0]), name)


class Smooth(Schedule):
    """Texture lags by a square: rates that vary within the one segment."""

    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        return StreamTimes(torch.stack([u**2, u], dim=-1), torch.stack([2 * u, torch.ones_like(u)], dim=-1))


def test_a_smooth_schedule_is_integrated_at_the_solvers_order(noise):
    data = mixture(1)
    error = errors(data.velocity, noise, Smooth(STREAMS), data.transport(noise), solver="heun")
    assert order(error, 60) == pytest.approx(2, abs=0.12)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8])
def test_dopri5_reaches_its_tolerance(rtol, schedule, noise):
    data = mixture(1)
    options = {"rtol": rtol, "atol": rtol / 10}
    x = integrate(data.velocity, noise, schedule, COMPOSITE, solver="dopri5", options=options).x
    assert (x - data.transport(noise)).abs().max() < 30 * rtol  # errors of a dozen steps add up


def test_heun_blind_to_knots_loses_its_order(noise, offset):
    data = mixture(1)
    exact = data.transport(noise)
    stopping = errors(data.velocity, noise, offset, exact, solver="heun")
    blind = errors(data.velocity, noise, offset, exact, solver="heun", knots=False)
    assert order(blind, 60) < 1.3
    assert blind(100) > 50 * stopping(100)


def test_dopri5_blind_to_knots_pays_more_for_less(noise, offset):
    data = mixture(1)
    options = {"rtol": 1e-4, "atol": 1e-6}
    stopping, blind = (
        integrate(data.velocity, noise, offset, COMPOSITE, solver="dopri5", options=options, knots=knots)
        for knots in (True, False)
    )
    exact = data.transport(noise)
    assert blind.nfe > 2 * stopping.nfe
    assert (blind.x - exact).abs().max() > 2 * (stopping.x - exact).abs().max()


def moments(data) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a mixture."""
    mean = data.weights @ data.means
    spread = data.means - mean
    covariance = torch.einsum("c,ci,cj->ij", data.weights, spread, spread)
    return mean, covariance + torch.diag(data.weights @ data.stds**2)


def test_samples_of_a_mixture_have_its_moments(offset):
    """Many samples through the offset schedule: the mean and covariance across streams are those of the data."""
    data = mixture(2)
    noise = torch.randn(20_000, COMPOSITE.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = integrate(data.velocity, noise, offset, COMPOSITE, solver="heun", steps=60).x
    mean, covariance = moments(data)
    torch.testing.assert_close(x.mean(dim=0), mean, rtol=0, atol=0.05)  # 4 standard errors
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.12)


def sde(noise: Tensor, seeds: Sequence[int] | None, amount: float = 1.0) -> Tensor:
    schedule, options = build_schedule("offset", STREAMS), {"noise": amount}
    velocity = mixture(2).velocity
    return integrate(velocity, noise, schedule, COMPOSITE, solver="sde", steps=24, options=options, seeds=seeds).x


@pytest.mark.parametrize("amount", [0.5, 1.5])
def test_churn_keeps_the_mixtures_moments(amount):
    seeds = range(3000)
    start = initial_noise(seeds, COMPOSITE).double()
    x = sde(start, seeds, amount)
    mean, covariance = moments(mixture(2))
    torch.testing.assert_close(x.mean(dim=0), mean, rtol=0, atol=0.13)  # 4 standard errors
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.32)
    assert (x - sde(start, seeds, 0.0)).square().mean() > 0.1 * covariance.diag().mean()


def test_churn_is_a_function_of_seed_and_step():
    seeds = [5, 0, 17, 3]
    start = initial_noise(seeds, COMPOSITE).double()
    whole = sde(start, seeds)
    torch.testing.assert_close(sde(start[2:], seeds[2:]), whole[2:], rtol=0, atol=1e-13)
    assert not torch.allclose(sde(start, [5, 0, 17, 4])[3], whole[3], atol=0.01)
    with pytest.raises(SFDError, match="no seeds"):
        sde(start, None)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "sde", "dopri5"])
def test_a_stream_at_rest_does_not_move_a_bit(solver, noise, offset):
    first, last = offset.knots
    seen: list[Progress] = []
    integrate(
        mixture(3).velocity, noise, offset, COMPOSITE, solver=solver, steps=13, seeds=range(8), callback=seen.append
    )
    arrived = next(p.x for p in seen if p.u == last)
    for p in seen:
        if p.u <= first:
            assert torch.equal(COMPOSITE.unpack(p.x)["texture"], COMPOSITE.unpack(noise)["texture"])
        if p.u >= last:
            assert torch.equal(COMPOSITE.unpack(p.x)["semantic"], COMPOSITE.unpack(arrived)["semantic"])
    assert not torch.equal(COMPOSITE.unpack(seen[-1].x)["texture"], COMPOSITE.unpack(noise)["texture"])


def test_the_velocity_of_a_stream_at_rest_is_not_needed(noise):
    """Not even finite: nothing of it reaches the state."""
    data, schedule = mixture(1), build_schedule("sequential", STREAMS)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        waiting = COMPOSITE.per_entry(torch.tensor([t[1].item() < 1, False]))
        return data.velocity(x, t).masked_fill(waiting, torch.nan)

    x = integrate(velocity, noise, schedule, COMPOSITE, solver="heun", steps=40).x
    torch.testing.assert_close(x, integrate(data.velocity, noise, schedule, COMPOSITE, solver="heun", steps=40).x)


def test_progress_holds_times_states_and_nfe(noise, offset):
    seen: list[Progress] = []
    result = integrate(mixture(1).velocity, noise, offset, COMPOSITE, solver="heun", steps=10, callback=seen.append)
    assert len(seen) == 10
    assert set(offset.knots) <= {p.u for p in seen}
    assert [p.nfe for p in seen] == list(range(2, 21, 2))
    assert result.nfe == 20
    assert torch.equal(seen[-1].x, result.x)
    for p in seen:
        torch.testing.assert_close(p.t, offset.at(torch.tensor(p.u, dtype=torch.float64)).time)


def test_a_segment_where_nothing_moves_costs_nothing(noise):
    """Beyond Δ = 1 leaders wait at 1 until followers set out."""
    schedule = build_schedule({"name": "offset", "delta": 3.0}, STREAMS)
    assert len(schedule.segments) == 3
    assert integrate(mixture(1).velocity, noise, schedule, COMPOSITE, solver="euler", steps=2).nfe == 2


@pytest.mark.parametrize(("solver", "each"), [("euler", 1), ("heun", 2), ("sde", 2), ("multistep", 1)])
def test_nfe_per_step(solver, each, noise, offset):
    result = integrate(
        mixture(1).velocity, noise, offset, COMPOSITE, solver=solver, steps=17, seeds=range(8)
    )  # fmt: skip
    assert result.nfe == each * 17


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_an_image_does_not_depend_on_its_batch(solver, offset):
    data, seeds = mixture(3), [5, 0, 17, 3]

    def sample(chosen: list[int]) -> Tensor:
        noise = initial_noise(chosen, COMPOSITE).double()
        return integrate(data.velocity, noise, offset, COMPOSITE, solver=solver, steps=20).x

    alone = torch.cat([sample([seed]) for seed in seeds])
    torch.testing.assert_close(sample(seeds), alone, rtol=0, atol=1e-13)
    assert torch.equal(initial_noise(seeds, COMPOSITE)[2:3], initial_noise([17], COMPOSITE))


def test_noise_is_standard_normal():
    noise = initial_noise(range(5000), COMPOSITE)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise.T.cov(), torch.eye(COMPOSITE.size), rtol=0, atol=0.08)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest entry."""
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize(("shift", "key"), [(1.0, "0.0"), (0.3, "0.3")])
def test_published_euler_samples(shift, key):
    velocity, latent, io, meta = published()
    steps = meta["sampler"]["euler_time_points"] - 1
    schedule = build_schedule("offset", latent.names)
    noise = io["noise"].flatten(1)
    x = integrate(velocity, noise, schedule, latent, solver="euler", steps=steps, shift=shift, knots=False).x
    close(x, io[f"sample_euler_shift{key}"].flatten(1), 1e-5)


@pytest.mark.parametrize("knots", [True, False])
def test_published_dopri5_samples(knots):
    velocity, latent, io, meta = published()
    schedule, options = build_schedule("offset", latent.names), meta["sampler"]["dopri5"]
    noise = io["noise"].flatten(1)
    x = integrate(velocity, noise, schedule, latent, solver="dopri5", options=options, knots=knots).x
    close(x, io["sample_dopri5_shift0.0"].flatten(1), 1e-4)


def published() -> tuple[VelocityField, CompositeLatent, dict[str, Tensor], dict[str, Any]]:
    """The published network as a velocity of the reference labels, and the reference numbers."""
    meta = json.loads((GOLDEN / "dit_sfd.json").read_text())
    config = published_config(meta["config"])
    model = LightningDiT(config).eval()
    model.load_state_dict(interop.from_published(load_file(GOLDEN / "dit_sfd.weights.safetensors"), config))
    io = load_file(GOLDEN / "dit_sfd.io.safetensors")

    @torch.no_grad()
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t.expand(len(x), -1), io["y"]).velocity

    return velocity, config.composite, io, meta


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 2},  # fewer than the schedule's three segments
        {"solver": "hean"},
        {"shift": 0.0},
        {"noise": torch.zeros(2, 5)},
        {"seeds": [1]},
        {"schedule": build_schedule("synchronous", ("semantic", "texture"))},
        {"schedule": build_schedule("synchronous", ("texture",))},
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    defaults = {"noise": torch.zeros(2, 6), "schedule": build_schedule("offset", STREAMS)}
    with pytest.raises(SFDError):
        integrate(mixture(1).velocity, latent=COMPOSITE, **(defaults | wrong))


def test_a_negative_seed_is_refused():
    with pytest.raises(SFDError):
        initial_noise([0, -3], COMPOSITE)
