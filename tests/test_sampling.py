"""The sampler against exact flows: at each solver's order across knots, and against the published sampler's numbers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from exact_flow import COMPOSITE, ORDERS, SCHEDULES, STREAMS, check_order, mixture, order
from sfd.convert import transformer as interop
from sfd.guidance import VelocityField
from sfd.latents import CompositeLatent
from sfd.models.dit import LightningDiT
from sfd.sampling import Progress, initial_noise, integrate
from sfd.schedules import Schedule, StreamTimes, build_schedule
from sfd.utils.errors import SFDError

GOLDEN = Path(__file__).parent / "golden"
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return build_schedule(SCHEDULES[request.param], STREAMS)


@pytest.fixture
def noise() -> Tensor:
    return initial_noise(range(8), COMPOSITE).double()


@functools.cache
def reference(spec: str) -> Tensor:
    """Where the mixture of three carries the noise by a schedule, to twelve digits."""
    noise = initial_noise(range(8), COMPOSITE).double()
    schedule = build_schedule(json.loads(spec), STREAMS)
    return integrate(mixture(3).velocity, noise, schedule, COMPOSITE, solver="dopri5", options=TIGHT).x


@pytest.mark.parametrize("name", ORDERS)
def test_one_gaussian_at_the_solvers_order(name, schedule, noise):
    data = mixture(1)

    def error(steps: int) -> float:
        x = integrate(data.velocity, noise, schedule, COMPOSITE, **ORDERS[name][0], steps=steps).x
        return (x - data.transport(noise)).abs().mean().item()

    check_order(error, name)


@pytest.mark.parametrize("name", ORDERS)
def test_mixture_at_the_solvers_order(name, schedule, noise):
    data = mixture(3)
    exact = reference(json.dumps(schedule.spec))

    def error(steps: int) -> float:
        x = integrate(data.velocity, noise, schedule, COMPOSITE, **ORDERS[name][0], steps=steps).x
        return (x - exact).abs().mean().item()

    check_order(error, name)


@pytest.mark.parametrize("name", ORDERS)
def test_a_time_shift_keeps_the_order(name, noise):
    data, schedule = mixture(1), build_schedule(SCHEDULES["offset"], STREAMS)

    def error(steps: int) -> float:
        x = integrate(data.velocity, noise, schedule, COMPOSITE, **ORDERS[name][0], steps=steps, shift=0.6).x
        return (x - data.transport(noise)).abs().mean().item()

    check_order(error, name)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8])
def test_dopri5_reaches_its_tolerance(rtol, schedule, noise):
    data = mixture(1)
    options = {"rtol": rtol, "atol": rtol / 10}
    x = integrate(data.velocity, noise, schedule, COMPOSITE, solver="dopri5", options=options).x
    assert (x - data.transport(noise)).abs().max() < 30 * rtol  # errors of a dozen steps add up


def test_heun_blind_to_knots_loses_its_order(noise):
    data, schedule = mixture(1), build_schedule(SCHEDULES["offset"], STREAMS)

    def error(steps: int, knots: bool) -> float:
        x = integrate(data.velocity, noise, schedule, COMPOSITE, solver="heun", steps=steps, knots=knots).x
        return (x - data.transport(noise)).abs().mean().item()

    assert order(lambda n: error(n, knots=False), 60) < 1.3
    assert error(100, knots=False) > 50 * error(100, knots=True)


def test_dopri5_blind_to_knots_pays_more_for_less(noise):
    data, schedule = mixture(1), build_schedule(SCHEDULES["offset"], STREAMS)
    options = {"rtol": 1e-4, "atol": 1e-6}
    seeing, blind = (
        integrate(data.velocity, noise, schedule, COMPOSITE, solver="dopri5", options=options, knots=knots)
        for knots in (True, False)
    )
    exact = data.transport(noise)
    assert blind.evaluations > 2 * seeing.evaluations
    assert (blind.x - exact).abs().max() > 2 * (seeing.x - exact).abs().max()


def test_samples_of_a_mixture_have_its_moments():
    """Many samples through the offset schedule: the mean and covariance across streams are those of the data."""
    data, schedule = mixture(2), build_schedule(SCHEDULES["offset"], STREAMS)
    noise = torch.randn(20_000, COMPOSITE.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = integrate(data.velocity, noise, schedule, COMPOSITE, solver="heun", steps=60).x
    mean = data.weights @ data.means
    spread = data.means - mean
    covariance = torch.einsum("c,ci,cj->ij", data.weights, spread, spread) + torch.diag(data.weights @ data.stds**2)
    torch.testing.assert_close(x.mean(dim=0), mean, rtol=0, atol=0.05)  # 4 standard errors
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.12)


def sde(noise: Tensor, seeds: Sequence[int], amount: float = 1.0) -> Tensor:
    schedule, options = build_schedule(SCHEDULES["offset"], STREAMS), {"noise": amount}
    velocity = mixture(2).velocity
    return integrate(velocity, noise, schedule, COMPOSITE, solver="sde", steps=24, options=options, seeds=seeds).x


@pytest.mark.parametrize("amount", [0.5, 1.5])
def test_noise_on_the_way_keeps_the_mixtures_moments(amount):
    data, seeds = mixture(2), range(3000)
    start = initial_noise(seeds, COMPOSITE).double()
    x = sde(start, seeds, amount)
    mean = data.weights @ data.means
    spread = data.means - mean
    covariance = torch.einsum("c,ci,cj->ij", data.weights, spread, spread) + torch.diag(data.weights @ data.stds**2)
    torch.testing.assert_close(x.mean(dim=0), mean, rtol=0, atol=0.13)  # 4 standard errors
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0, atol=0.32)
    assert (x - sde(start, seeds, 0.0)).square().mean() > 0.1 * covariance.diag().mean()


def test_noise_on_the_way_is_a_function_of_seed_and_step():
    seeds = [5, 0, 17, 3]
    start = initial_noise(seeds, COMPOSITE).double()
    whole = sde(start, seeds)
    torch.testing.assert_close(sde(start[2:], seeds[2:]), whole[2:], rtol=0, atol=1e-13)
    assert not torch.allclose(sde(start, [5, 0, 17, 4])[3], whole[3], atol=0.01)


def test_noise_on_the_way_needs_seeds(noise):
    schedule = build_schedule(SCHEDULES["offset"], STREAMS)
    with pytest.raises(SFDError, match="has no seeds to draw it from"):
        integrate(mixture(1).velocity, noise, schedule, COMPOSITE, solver="sde", steps=9)


class Smooth(Schedule):
    """Texture lags by a square: rates that vary within the one segment."""

    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        return StreamTimes(torch.stack([u**2, u], dim=-1), torch.stack([2 * u, torch.ones_like(u)], dim=-1))


def test_a_smooth_schedule_is_integrated_at_the_solvers_order(noise):
    data = mixture(1)

    def error(steps: int) -> float:
        x = integrate(data.velocity, noise, Smooth(STREAMS), COMPOSITE, solver="heun", steps=steps).x
        return (x - data.transport(noise)).abs().mean().item()

    assert order(error, 60) == pytest.approx(2, abs=0.12)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "sde", "dopri5"])
def test_a_stream_at_rest_does_not_move_a_bit(solver, noise):
    schedule = build_schedule(SCHEDULES["offset"], STREAMS)
    first, last = schedule.knots
    seen: list[Progress] = []
    steps = None if solver == "dopri5" else 13
    x = integrate(
        mixture(3).velocity, noise, schedule, COMPOSITE, solver=solver, steps=steps, seeds=range(8),
        callback=seen.append,
    ).x  # fmt: skip
    arrived = next(p.x for p in seen if p.u == last)
    for p in seen:
        if p.u <= first:
            assert torch.equal(COMPOSITE.unpack(p.x)["texture"], COMPOSITE.unpack(noise)["texture"])
        if p.u >= last:
            assert torch.equal(COMPOSITE.unpack(p.x)["semantic"], COMPOSITE.unpack(arrived)["semantic"])
    assert not torch.equal(COMPOSITE.unpack(x)["texture"], COMPOSITE.unpack(noise)["texture"])


def test_the_velocity_of_a_stream_at_rest_is_not_needed(noise):
    """Not even finite: nothing of it reaches the state."""
    data, schedule = mixture(1), build_schedule({"name": "sequential"}, STREAMS)

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        waiting = COMPOSITE.per_entry(torch.tensor([times[1].item() < 1, False]))
        return data.velocity(x, times).masked_fill(waiting, torch.nan)

    x = integrate(velocity, noise, schedule, COMPOSITE, solver="heun", steps=40).x
    torch.testing.assert_close(x, integrate(data.velocity, noise, schedule, COMPOSITE, solver="heun", steps=40).x)


def test_progress_tells_times_states_and_evaluations(noise):
    schedule = build_schedule(SCHEDULES["offset"], STREAMS)
    seen: list[Progress] = []
    result = integrate(mixture(1).velocity, noise, schedule, COMPOSITE, solver="heun", steps=10, callback=seen.append)
    assert len(seen) == 10
    assert set(schedule.knots) <= {p.u for p in seen}
    assert [p.evaluations for p in seen] == list(range(2, 21, 2))
    assert result.evaluations == 20
    assert torch.equal(seen[-1].x, result.x)
    for p in seen:
        torch.testing.assert_close(p.times, schedule.at(torch.tensor(p.u, dtype=torch.float64)).time)


def test_a_segment_where_nothing_moves_costs_nothing(noise):
    """Beyond Δ = 1 leaders wait at 1 until followers set out."""
    schedule = build_schedule({"name": "offset", "delta": 3.0}, STREAMS)
    assert len(schedule.segments) == 3
    assert integrate(mixture(1).velocity, noise, schedule, COMPOSITE, solver="euler", steps=2).evaluations == 2


@pytest.mark.parametrize(("solver", "each"), [("euler", 1), ("heun", 2), ("sde", 2), ("multistep", 1)])
def test_evaluations_a_step(solver, each, noise):
    schedule, velocity = build_schedule(SCHEDULES["offset"], STREAMS), mixture(1).velocity
    result = integrate(velocity, noise, schedule, COMPOSITE, solver=solver, steps=17, seeds=range(8))
    assert result.evaluations == each * 17


def test_steps_of_each_images_own_are_counted_by_image(noise):
    schedule = build_schedule(SCHEDULES["offset"], STREAMS)
    options = {"rtol": 1e-6, "control": "image"}
    result = integrate(mixture(3).velocity, noise, schedule, COMPOSITE, solver="dopri5", options=options)
    assert result.image_evaluations.max() <= result.evaluations
    assert result.image_evaluations.min() < result.image_evaluations.max()
    fixed = integrate(mixture(3).velocity, noise, schedule, COMPOSITE, solver="heun", steps=9)
    assert fixed.image_evaluations.tolist() == [18] * 8


def test_steps_of_each_images_own_reach_the_samples(noise, schedule):
    options = {"rtol": 1e-7, "atol": 1e-8, "control": "image"}
    x = integrate(mixture(3).velocity, noise, schedule, COMPOSITE, solver="dopri5", options=options).x
    torch.testing.assert_close(x, reference(json.dumps(schedule.spec)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_an_image_does_not_depend_on_its_batch(solver):
    data, schedule = mixture(3), build_schedule(SCHEDULES["offset"], STREAMS)
    seeds = [5, 0, 17, 3]

    def sample(chosen: list[int]) -> Tensor:
        noise = initial_noise(chosen, COMPOSITE).double()
        return integrate(data.velocity, noise, schedule, COMPOSITE, solver=solver, steps=20).x

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
    velocity, composite, io, meta = published()
    x = integrate(
        velocity,
        io["noise"].flatten(1),
        build_schedule({"name": "offset", "delta": 0.3}, composite.names),
        composite,
        solver="euler",
        steps=meta["sampler"]["euler_time_points"] - 1,
        shift=shift,
        knots=False,
    ).x
    close(x, io[f"sample_euler_shift{key}"].flatten(1), 1e-5)


@pytest.mark.parametrize("knots", [True, False])
def test_published_dopri5_samples(knots):
    velocity, composite, io, meta = published()
    x = integrate(
        velocity,
        io["noise"].flatten(1),
        build_schedule({"name": "offset", "delta": 0.3}, composite.names),
        composite,
        solver="dopri5",
        options=meta["sampler"]["dopri5"],
        knots=knots,
    ).x
    close(x, io["sample_dopri5_shift0.0"].flatten(1), 1e-4)


def published() -> tuple[VelocityField, CompositeLatent, dict[str, Tensor], dict[str, Any]]:
    """The published network as a velocity of the reference labels, and the reference numbers."""
    meta = json.loads((GOLDEN / "dit_sfd.json").read_text())
    config = interop.published_config(meta["config"])
    model = LightningDiT(config).eval()
    model.load_state_dict(interop.from_published(load_file(GOLDEN / "dit_sfd.weights.safetensors"), config))
    io = load_file(GOLDEN / "dit_sfd.io.safetensors")

    @torch.no_grad()
    def velocity(x: Tensor, times: Tensor) -> Tensor:
        return model(x, times.expand(len(x), -1), io["y"]).velocity

    return velocity, config.composite, io, meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 2}, r"knots \(u = 0.2308, 0.7692\), and each of the 3 pieces between needs one, but 2"),
        ({"steps": 0}, "at least 1, got 0"),
        ({}, "needs a number of steps, at least 3"),
        ({"solver": "dopri5", "steps": 50}, "chooses its own steps, but 50"),
        ({"solver": "dopri5", "shift": 0.3}, "a time shift does nothing"),
        ({"solver": "dopri5", "budget": "equal"}, "a budget of steps does nothing"),
        ({"steps": 10, "budget": "lenght"}, "no budget 'lenght'; did you mean 'length'"),
        ({"steps": 10, "budget": (1.0, 2.0)}, r"each of the 3 segments in which a stream moves, got \[1.0, 2.0\]"),
        ({"steps": 10, "budget": (1.0, 0.0, 1.0)}, "one greater than 0"),
        ({"steps": 10, "seeds": [1]}, "1 seeds were given for noise of 2 images"),
        ({"steps": 10, "shift": 0.0}, "shift must be from 0.01 to 100"),
        ({"steps": 10, "solver": "eular"}, "did you mean 'euler'"),
        ({"steps": 10, "options": {"rtol": 1.0}}, "no field 'rtol'"),
        ({"steps": 10, "noise": torch.zeros(2, 5)}, r"shape \(images, 6\), got \(2, 5\)"),
        (
            {"steps": 10, "schedule": build_schedule({"name": "synchronous"}, ("texture",))},
            "drives streams texture, but",
        ),
    ],
)
def test_mistakes_are_explained(arguments, message):
    defaults = {"noise": torch.zeros(2, 6), "schedule": build_schedule({"name": "offset"}, STREAMS)}
    with pytest.raises(SFDError, match=message):
        integrate(mixture(1).velocity, composite=COMPOSITE, **(defaults | arguments))


def test_a_negative_seed_is_refused():
    with pytest.raises(SFDError, match="at least 0, got -3"):
        initial_noise([0, -3], COMPOSITE)
