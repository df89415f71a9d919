"""Learned schedules: tables of increments, shortest paths through known errors, and `sfd learn-schedule`."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.cli import done, refused, sfd
from helpers.exact_flow import COMPOSITE, STREAMS
from helpers.random_model import random_model
from sfd.generation.model import load_model
from sfd.models.dit import DiTOutput
from sfd.run.recipe import load_recipe
from sfd.schedule import build_schedule
from sfd.training.schedule_path import (
    EDGE,
    MOVES,
    Path,
    as_schedule,
    loss_along,
    measure_errors,
    move_costs,
    shortest_path,
)
from sfd.training.tasks.joint_schedule import SPEED, JointModel, JointTask
from tiny import write_recipe


def offset_increments(delta, leader="semantic"):
    """The offset schedule by its increments, for Δ ≤ 1 a multiple of a tenth."""
    lead = round(10 * delta)
    rows = {name: [0, 10 - lead, lead] for name in STREAMS} | {leader: [lead, 10 - lead, 0]}
    kept = [i for i, base in enumerate([lead, 10 - lead, lead]) if base]
    increments = {name: [row[i] for i in kept] for name, row in rows.items()}
    return {"name": "learned", "increments": increments, "base": [[lead, 10 - lead, lead][i] for i in kept]}


def assert_same(schedule, other):
    assert schedule.knots == pytest.approx(other.knots, abs=1e-15)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    u = u[[all(abs(float(each) - knot) > 1e-9 for knot in other.knots) for each in u]]
    for mine, its in zip(schedule.at(u), other.at(u), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0])
def test_the_offset_schedule_is_a_table_of_increments(delta):
    offset = build_schedule({"name": "offset", "delta": delta}, STREAMS)
    assert_same(build_schedule(offset_increments(delta), STREAMS), offset)


def test_without_a_base_all_intervals_are_alike_and_units_do_not_matter():
    increments = {"texture": [0, 1, 3], "semantic": [0.2, 0.2, 0]}
    schedule = build_schedule({"name": "learned", "increments": increments}, STREAMS)
    table = {"texture": [[0, 0], [1 / 3, 0], [2 / 3, 0.25], [1, 1]], "semantic": [[0, 0], [2 / 3, 1], [1, 1]]}
    assert_same(schedule, build_schedule({"name": "table", "points": table}, STREAMS))


def test_a_model_with_the_offset_as_a_table_gives_the_same_images_and_is_saved_with_it(tmp_path):
    model = random_model(0)
    names = model.composite.names
    model = replace(model, schedule=build_schedule({"name": "offset", "delta": 0.3}, names), saved_identity="")
    table = replace(model, schedule=build_schedule(offset_increments(0.3), names), saved_identity="")
    table.save(tmp_path / "model")
    loaded = load_model(tmp_path / "model", torch.device("cpu"))
    assert loaded.schedule.spec == table.schedule.spec
    for solver in ("multistep", "heun", "dopri5"):  # 8 steps: no two intervals have equal claims to one
        expected, found = (m.sample("disk", seeds=3, steps=8, solver=solver, output="latent") for m in (model, loaded))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- the path --------------------------------------------------------------------------------------------------------


def all_paths(grid, point=(0, 0)):
    if point == (grid, grid):
        yield (point,)
    for a, b in MOVES:
        if point[0] + a <= grid and point[1] + b <= grid:
            for rest in all_paths(grid, (point[0] + a, point[1] + b)):
                yield (point, *rest)


def cost_of(points, errors, length, bend):
    grid = errors.shape[1] - 1
    moves = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(points)]
    total = sum(move_costs(errors, move)[point] for point, move in zip(points[:-1], moves, strict=True))
    return total + length * sum(map(max, moves)) / grid + bend * sum(a != b for a, b in pairwise(moves))


@pytest.mark.parametrize(("length", "bend"), [(0, 0), (0.3, 0), (0, 0.05), (0.2, 0.1)])
@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_the_shortest_path_is_the_cheapest_of_all_paths(grid, length, bend):
    for seed in range(5):
        errors = np.random.default_rng(seed).random((2, grid + 1, grid + 1))
        found = shortest_path(errors, length, bend)
        costs = {points: cost_of(points, errors, length, bend) for points in all_paths(grid)}
        assert found.cost == pytest.approx(min(costs.values()), abs=1e-12)
        assert costs[found.points] == pytest.approx(found.cost, abs=1e-12)


def plane(grid, *slopes):
    """Errors 3 + a·t_0 + b·t_1 of both streams."""
    t = np.linspace(0, 1, grid + 1)
    return np.stack([3 + a * t[:, None] + b * t for a, b in slopes])


def test_costs_of_a_path_are_the_line_integral_along_its_schedule():
    errors = plane(4, (0.7, -1.1), (-2, 0.4))
    for points in all_paths(4):
        schedule = build_schedule(as_schedule(Path(points, 0.0), STREAMS), STREAMS)
        assert loss_along(errors, schedule) == pytest.approx(cost_of(points, errors, 0, 0), abs=1e-9)


@pytest.mark.parametrize("leader", STREAMS)
def test_with_a_constant_difference_of_sensitivities_the_offset_schedule_is_best(leader):
    """∂e_1/∂t_0 = −c alone: a path with lead Δ costs −c·(Δ − Δ²/2) + λ·Δ more than the diagonal: Δ = 1 − λ/c."""
    slopes = {"texture": [(0, 0), (-1, 0)], "semantic": [(0, -1), (0, 0)]}[leader]
    found = shortest_path(plane(10, *slopes), length=0.7)
    spec = {"name": "offset", "delta": 0.3, "leaders": [leader]}
    assert_same(build_schedule(as_schedule(found, STREAMS), STREAMS), build_schedule(spec, STREAMS))
    diagonal = loss_along(plane(10, *slopes), build_schedule("synchronous", STREAMS)) + 0.7
    assert found.cost - diagonal == pytest.approx(-(0.3 - 0.3**2 / 2) + 0.7 * 0.3, abs=1e-9)


def test_a_price_on_bends_leaves_fewer_knots():
    errors = np.random.default_rng(0).random((2, 17, 17))
    counts = [len(as_schedule(shortest_path(errors, bend=bend), STREAMS)["base"]) for bend in (0, 0.01, 0.1, 10)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1 < counts[0]


# --- Gaussian data, where errors are known ---------------------------------------------------------------------------


class JointGaussian(torch.nn.Module):
    """Data x1 ~ N(0, C) with C common to both streams, and its exact velocity."""

    def __init__(self):
        super().__init__()
        self.mixing = torch.randn(COMPOSITE.size, COMPOSITE.size, generator=torch.Generator().manual_seed(0)).double()
        self.covariance = self.mixing @ self.mixing.T / COMPOSITE.size

    def joint(self, times):
        """Covariance of v = x1 − x0 with x, and of x, at one pair of times."""
        t = COMPOSITE.per_entry(times).diag()
        rest = torch.eye(COMPOSITE.size) - t
        return self.covariance @ t - rest, t @ self.covariance @ t + rest @ rest

    def forward(self, x, times, labels):
        cross, own = self.joint(times[0])
        return DiTOutput(x @ torch.linalg.solve(own, cross.T), None, None)

    def errors(self, t0, t1):
        """Mean squared error of each stream: the posterior variance of its velocity."""
        cross, own = self.joint(torch.tensor([t0, t1], dtype=torch.float64))
        total = self.covariance + torch.eye(COMPOSITE.size) - cross @ torch.linalg.solve(own, cross.T)
        return [float(each.mean()) for each in total.diag().split(COMPOSITE.sizes)]


def test_measured_errors_are_those_of_the_posterior():
    data, draw = JointGaussian(), torch.Generator().manual_seed(1)
    x0, w = (torch.randn(4000, COMPOSITE.size, generator=draw, dtype=torch.float64) for _ in range(2))
    batch = {"x1": w @ data.mixing.T / COMPOSITE.size**0.5, "x0": x0, "labels": torch.zeros(4000, dtype=torch.int64)}
    found = measure_errors(data, COMPOSITE, batch, 4, 900)
    ticks = [EDGE, 0.25, 0.5, 0.75, 1 - EDGE]
    exact = np.array([[data.errors(a, b) for b in ticks] for a in ticks]).transpose(2, 0, 1)
    np.testing.assert_allclose(found, exact, rtol=0.06)


# --- schedule and network together -----------------------------------------------------------------------------------

UNEVEN = torch.tensor([[0.4, -0.3, 0.1], [-0.2, 0.5, 0.0]], dtype=torch.float64) / SPEED


class GaussianTask:
    """What `JointTask` asks of the diffusion task."""

    composite = COMPOSITE


def joint(data, kinetic):
    data.config = SimpleNamespace(composite=COMPOSITE)
    model = JointModel(data, 2, 3).double()
    with torch.no_grad():
        model.logits.copy_(UNEVEN)
    return JointTask(model, GaussianTask(), kinetic)


class Frozen(JointTask):
    """The objective as numbers, with the weights τ_k′ of another schedule."""

    def value(self, logits, batch):
        at = self.model.at(batch["u"])
        with torch.no_grad():
            kept = self.model.logits.clone()
            self.model.logits.copy_(logits)
            found = self.model(**batch)
            self.model.logits.copy_(kept)
        squares = (found.velocity - batch["x1"] + batch["x0"]).square()
        error, energy = (
            [each.flatten(1).mean(1) for each in COMPOSITE.unpack(values).values()]
            for values in (squares, found.velocity.square())
        )
        weighted = [at.rate[:, k] * error[k] + self.kinetic * found.rates[:, k] ** 2 * energy[k] for k in (0, 1)]
        return float(sum(weighted).detach().mean())


def gaussian_batch(data, count, seed):
    draw = torch.Generator().manual_seed(seed)
    x0, w = (torch.randn(count, COMPOSITE.size, generator=draw, dtype=torch.float64) for _ in range(2))
    batch = {"x1": w @ data.mixing.T / COMPOSITE.size**0.5, "x0": x0, "labels": torch.zeros(count, dtype=torch.int64)}
    return batch | {"u": torch.rand(count, generator=draw, dtype=torch.float64)}


class EachAlone(JointGaussian):
    """The exact velocity where every row has its own times."""

    def forward(self, x, times, labels):
        return DiTOutput(
            torch.cat(
                [super(EachAlone, self).forward(x[i : i + 1], times[i : i + 1], None).velocity for i in range(len(x))]
            ),
            None,
            None,
        )


def test_a_joint_schedule_is_the_table_of_its_increments():
    model = joint(JointGaussian(), 0.0).model
    increments = dict(zip(STREAMS, model.increments().tolist(), strict=True))
    schedule = build_schedule({"name": "learned", "increments": increments}, STREAMS)
    u = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mine, its in zip(model.at(u), schedule.at(u), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def test_the_joint_gradient_holds_the_weights_of_the_errors_and_not_those_of_the_energy():
    data = EachAlone()
    task, batch = joint(data, 0.3), gaussian_batch(data, 30, 2)
    task.loss(task.model, batch)["loss"].backward()
    frozen = Frozen(task.model, task.diffusion, task.kinetic)
    for index in np.ndindex(2, 3):
        ends = []
        for sign in (1, -1):
            logits = UNEVEN.clone()
            logits[index] += sign * 1e-6
            ends.append(frozen.value(logits, batch))
        difference = (ends[0] - ends[1]) / 2e-6
        assert float(task.model.logits.grad[index]) == pytest.approx(difference, rel=1e-5, abs=1e-6)


# --- sfd learn-schedule ----------------------------------------------------------------------------------------------

OPTIONS = ("--device", "cpu", "--share", 0.9, "--grid", 3, "--images", 8)


@pytest.fixture
def prepared(copied):
    return copied("training", "model", "samples", "metrics", "report.html")


def learn(tmp_path, out, *options):
    return sfd("learn-schedule", write_recipe(tmp_path), "--out", out, *OPTIONS, *options)


def test_the_learned_recipe_trains_in_the_same_folder(prepared, tmp_path):
    result = learn(tmp_path, prepared)
    assert result.exit_code == 0, result.output
    path = prepared / "schedule" / "learned.yaml"
    recipe = load_recipe(path)
    assert recipe.schedule["name"] == "learned" and recipe.loss.density == "stream"
    errors = json.loads((prepared / "schedule" / "errors.json").read_text())
    assert {name: np.shape(each) for name, each in errors.items()} == dict.fromkeys(STREAMS, (4, 4))
    assert (prepared / "schedule" / "map.png").read_bytes().startswith(b"\x89PNG")
    done("train", path, "--out", prepared, "--device", "cpu")
    model = load_model(prepared / "model", torch.device("cpu"))
    assert model.schedule.spec == build_schedule(recipe.schedule, model.composite.names).spec


def test_another_price_takes_the_same_probe(prepared, tmp_path):
    learn(tmp_path, prepared)
    before = (prepared / "schedule" / "stage.json").read_bytes()
    assert learn(tmp_path, prepared, "--length", 100).exit_code == 0
    assert (prepared / "schedule" / "stage.json").read_bytes() == before
    recipe = load_recipe(prepared / "schedule" / "learned.yaml")
    assert build_schedule(recipe.schedule, STREAMS).knots == ()  # the diagonal
    refused(learn(tmp_path, prepared, "--grid", 5), "probe.grid was 3 before and is 5 now")


def test_a_schedule_trained_with_its_probe_is_written_too(prepared, tmp_path):
    result = learn(tmp_path, prepared, "--method", "joint")
    assert result.exit_code == 0, result.output
    increments = json.loads((prepared / "schedule" / "increments.json").read_text())
    recipe = load_recipe(prepared / "schedule" / "learned.yaml")
    assert recipe.schedule == {"name": "learned", "increments": increments} and len(increments["texture"]) == 3
    assert not np.allclose(increments["texture"], 1 / 3, atol=1e-4)
    refused(learn(tmp_path, prepared), "probe.method was 'joint' before")


def test_a_single_stream_has_nothing_to_learn(prepared, tmp_path):
    single = ("streams={texture: {}, semantic: null}", "schedule={name: synchronous}")
    refused(sfd("learn-schedule", write_recipe(tmp_path), *single, "--out", tmp_path / "out"), "two streams")
