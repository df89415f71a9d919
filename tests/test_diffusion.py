"""The diffusion task: every random draw of a batch, and the losses."""

import numpy as np
import pytest
import torch

from helpers.latents import MANY, OFFSET, STREAMS, make_latents, make_model, make_task
from helpers.pictures import Unlabelled
from sfd import flow
from sfd.data.shapes import ShapesSource
from sfd.data.shards import FEATURES
from sfd.schedule import build_schedule
from sfd.utils.errors import SFDError


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return make_latents(ShapesSource(24, 0, 16), tmp_path_factory.mktemp("latents"))


def test_stream_times_follow_the_schedule(latents):
    # Under the synchronous schedule every stream's time is the base time.
    base = make_task(latents, {"name": "synchronous"}).batch(5, range(200))["times"]
    assert torch.equal(base[:, 0], base[:, 1])
    times = make_task(latents).batch(5, range(200))["times"]
    torch.testing.assert_close(times, build_schedule(OFFSET, STREAMS).at(base[:, 0]).time, rtol=0, atol=0)
    assert (times[:, 1] >= times[:, 0]).all() and (times[:, 1] > times[:, 0]).any()


def test_base_times_have_the_configured_distribution(latents):
    for distribution, middle in (("logit_normal", 0.7287), ("uniform", 0.5)):  # P(1/4 < u < 3/4)
        u = make_task(latents, {"name": "synchronous"}, base_time=distribution).batch(0, range(MANY))["times"][:, 0]
        share = ((u > 0.25) & (u < 0.75)).float().mean().item()
        assert share == pytest.approx(middle, abs=4 * (middle * (1 - middle) / MANY) ** 0.5)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_label_dropout(latents, share):
    task = make_task(latents, label_dropout=share)
    labels = task.batch(0, range(MANY))["labels"]
    dropped = labels == task.null_class
    assert dropped.float().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / MANY) ** 0.5)
    true = latents.labels[torch.from_numpy(task.order.indices(0, range(MANY), MANY))]
    assert torch.equal(labels[~dropped], true[~dropped])


def test_latents_and_features_are_flipped_together(latents):
    task = make_task(latents)
    batch = task.batch(0, range(200))
    indices = task.order.indices(0, range(200), MANY)

    def expected(flip):
        flips = np.full(200, flip)
        raw = {name: latents.read(name, indices, flips) for name in STREAMS}
        return task.composite.pack(task.composite.normalize(raw)), latents.read(FEATURES, indices, flips, None)

    (x1, features), (x1_flipped, features_flipped) = expected(False), expected(True)
    flipped = (batch["features"] != features).flatten(1).any(1)
    assert 60 < flipped.sum() < 140
    assert torch.equal(batch["x1"], torch.where(flipped[:, None], x1_flipped, x1))
    assert torch.equal(batch["features"], torch.where(flipped[:, None, None, None], features_flipped, features))
    unflipped = make_task(latents, flip=False).batch(0, range(200))["features"]
    assert unflipped.dtype == torch.float16 and torch.equal(unflipped, features)


def test_a_batch_does_not_depend_on_how_it_is_split(latents):
    task = make_task(latents, batch_size=8)
    whole, halves = task.batch(7, range(8)), [task.batch(7, part) for part in (range(4), range(4, 8))]
    for name, values in whole.items():
        assert torch.equal(values, torch.cat([half[name] for half in halves])), name


def test_the_loss_is_logged_per_stream_and_quarter_of_its_time(latents):
    task = make_task(latents)
    batch = task.batch(0, range(200))
    losses = task.loss(task.model, batch)
    weights = {"texture": 1.0, "semantic": 2.0}
    sizes = {s.name: s.size / task.composite.size for s in task.composite.streams}
    velocity = sum(weights[name] * sizes[name] * losses[f"velocity/{name}"] for name in STREAMS)
    torch.testing.assert_close(velocity, losses["velocity"])
    for k, name in enumerate(task.composite.names):
        quarters = torch.stack([losses[f"velocity/{name}/quarter-{q}"] for q in (1, 2, 3, 4)])
        torch.testing.assert_close(quarters[:, 0].sum() / 200, losses[f"velocity/{name}"])
        edges = torch.histc(batch["times"][:, k].float(), 4, 0, 1)
        assert torch.equal(quarters[:, 1], edges)


@pytest.mark.parametrize(("cosine", "repa"), [(0.7, 0.3), (0.0, 0.5), (0.5, 0.0)])
def test_the_loss_is_the_weighted_sum(latents, cosine, repa):
    task = make_task(latents, cosine=cosine, repa=repa)
    losses = task.loss(task.model, task.batch(0, range(8)))
    named = {name for name in losses if "/" not in name}
    assert named == {"loss", "velocity"} | {n for n, w in (("cosine", cosine), ("repa", repa)) if w}
    parts = losses["velocity"] + cosine * losses.get("cosine", 0) + repa * losses.get("repa", 0)
    torch.testing.assert_close(losses["loss"], parts)


@pytest.mark.parametrize("stationary", [True, False])
def test_a_stream_at_rest_is_in_the_loss_or_not(latents, stationary):
    task = make_task(latents, {"name": "sequential"}, stationary_streams=stationary)
    batch = task.batch(0, range(32))
    semantics_move = batch["times"][:, 0] == 0
    batch = {name: values[semantics_move] for name, values in batch.items()}
    losses = task.loss(task.model, batch)
    (losses["velocity"] + losses["cosine"]).backward()
    texture, semantic = (head.weight.grad.abs().sum() for head in task.model.heads)
    assert semantic > 0 and (texture > 0) == stationary
    x = flow.interpolate(batch["x1"], batch["x0"], task.composite.per_entry(batch["times"]))
    velocity = task.model(x, batch["times"], batch["labels"]).velocity
    squares = task.composite.unpack((velocity - (batch["x1"] - batch["x0"])).square())
    total = 2 * squares["semantic"].sum() + stationary * squares["texture"].sum()
    torch.testing.assert_close(losses["velocity"], total / batch["x1"].numel())


def test_without_classes_every_label_is_the_null_class(tmp_path):
    latents = make_latents(Unlabelled(6, 16), tmp_path)
    task = make_task(latents, label_dropout=0.5)
    labels = task.batch(0, range(50))["labels"]
    assert task.null_class == 0 and labels.tolist() == [0] * 50
    assert task.loss(task.model, task.batch(0, range(4)))["loss"].isfinite()


def test_repa_without_features_or_projector_is_refused(latents, tmp_path):
    without = make_latents(ShapesSource(6, 0, 16), tmp_path, features=False)
    with pytest.raises(SFDError, match=r"holds no features; .*latents\.features=true, or set loss\.repa=0"):
        make_task(without, model=make_model(without))
    assert "features" not in make_task(without, repa=0.0).batch(0, range(4))
    with pytest.raises(SFDError, match=r"needs transformer\.repa_block"):
        make_task(latents, model=make_model(latents, repa=False))


def test_streams_that_have_arrived_are_noised_again_and_nothing_else_changes(latents):
    plain, noised = (make_task(latents, arrived=a).batch(0, range(MANY)) for a in (1.0, 0.75))
    there = plain["times"] == 1
    assert there[:, 1].any() and not there[:, 0].any()
    drawn = noised["times"][there]
    assert drawn.min() >= 0.75 and drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(0.875, abs=4 * 0.25 / (12 * len(drawn)) ** 0.5)
    assert torch.equal(noised["times"][~there], plain["times"][~there])
    for name in plain.keys() - {"times"}:
        assert torch.equal(plain[name], noised[name]), name


def test_independent_times_are_each_streams_own_and_nothing_else_changes(latents):
    plain, free = (
        make_task(latents, times=t, base_time="uniform").batch(0, range(MANY)) for t in ("schedule", "independent")
    )
    assert abs(torch.corrcoef(free["times"].T)[0, 1]) < 4 / MANY**0.5
    for k in range(2):
        assert free["times"][:, k].mean().item() == pytest.approx(0.5, abs=4 / (12 * MANY) ** 0.5)
        assert free["times"][:, k].var().item() == pytest.approx(1 / 12, abs=4 / (180 * MANY) ** 0.5)
    for name in plain.keys() - {"times"}:
        assert torch.equal(plain[name], free[name]), name


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "offset", "delta": 0.3},
        {"name": "offset", "delta": 1.0},
        {"name": "learned", "increments": {"texture": [1, 2, 2, 4], "semantic": [3, 0, 2, 1]}, "base": [3, 2, 2, 4]},
    ],
)
def test_weighted_by_stream_each_streams_own_time_has_the_base_times_density(latents, distribution, schedule):
    batch = make_task(latents, schedule, base_time=distribution, density="stream").batch(0, range(MANY))
    expected = make_task(latents, {"name": "synchronous"}, base_time=distribution).batch(0, range(MANY))["times"][:, 0]
    for k in range(2):
        for power in (0, 1, 3):
            values = batch["weights"][:, k] * batch["times"][:, k] ** power
            spread = values.std() / MANY**0.5 + (expected**power).std() / MANY**0.5
            assert values.mean().item() == pytest.approx((expected**power).mean().item(), abs=4 * spread.item())


def test_a_network_of_data_gives_the_exact_velocity_of_the_data_it_gives(latents):
    model = make_model(latents)
    batch = make_task(latents, model=model).batch(0, range(50))
    model.config = model.config.model_copy(update={"prediction": "data"})
    x1, x0, times = batch["x1"], batch["x0"], batch["times"].clamp(max=0.9)
    x = flow.interpolate(x1, x0, model.config.composite.per_entry(times))
    model._heads = lambda *inputs: x1  # a network that sees through the noise
    found = model(x, times, batch["labels"]).velocity
    torch.testing.assert_close(found, flow.velocity_target(x1, x0), rtol=1e-4, atol=1e-4)
    at_rest = torch.ones_like(times)
    assert model(x1, at_rest, batch["labels"]).velocity.isfinite().all()
