"""Edits that change nothing change nothing, and what is to be kept is kept."""

from __future__ import annotations

import pytest
import torch

import sfd
from helpers.random_model import COMPOSITE, TEXTURE, random_model
from sfd.editing import (
    Follow,
    change_plan,
    edit,
    follow,
    interpolate_plans,
    keep_plan,
    mixed_noise,
    paint,
    sdedit,
    swap_plans,
)
from sfd.latents import CompositeLatent
from sfd.sampling import initial_noise, integrate
from sfd.utils.errors import SFDError

SEEDS, OTHERS = [0, 1, 2], [10, 11, 12]
STEPS = {"steps": 8}
LATENTS = initial_noise([7, 8, 9], COMPOSITE)


@pytest.fixture(scope="module")
def model():
    return random_model(0)


@pytest.fixture(scope="module")
def shapes():
    return sfd.load("shapes", device="cpu")


def parts(latents):
    return COMPOSITE.unpack(latents)


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, atol=atol)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_nothing_kept_is_a_sample(model, guidance):
    how = STEPS | {"guidance": guidance}
    expected = model.sample("ring", seeds=SEEDS, output="latent", **how)
    assert close(change_plan(model, SEEDS, SEEDS, classes="ring", **how), expected)
    nothing = torch.zeros(2, 2)
    assert close(keep_plan(model, LATENTS, SEEDS, where=nothing, plan_guidance=1, classes="ring", **how), expected)
    assert close(paint(model, LATENTS, torch.ones(2, 2), SEEDS, classes="ring", **how), expected)
    assert close(sdedit(model, LATENTS, 0.0, SEEDS, classes="ring", **how), expected)


def test_all_kept_is_the_source(model):
    assert close(paint(model, LATENTS, torch.zeros(2, 2), SEEDS, **STEPS), LATENTS)
    assert close(sdedit(model, LATENTS, 1.0, SEEDS, **STEPS), LATENTS)


def test_texture_is_guided_by_the_plan():
    """Away from the velocity at the point of the plan's path where its time is that of texture."""

    def velocity(x, t):
        return torch.sin(x.roll(3, 1)) + t.sum()

    noise, t, plan = initial_noise(SEEDS, COMPOSITE), torch.tensor([0.2, 0.7]), Follow(parts(LATENTS)["semantic"])
    assert COMPOSITE.names == ("texture", "semantic")
    x, weak = (torch.lerp(noise, LATENTS, COMPOSITE.per_entry(times)) for times in (t, torch.tensor([0.2, 0.2])))
    guided = parts(follow(velocity, noise, COMPOSITE, {"semantic": plan}, 1.5)(x, t))
    own, other = (parts(velocity(at, time))["texture"] for at, time in ((x, t), (weak, torch.tensor([0.2, 0.2]))))
    assert close(guided["texture"], other + 1.5 * (own - other))
    assert close(guided["semantic"], plan.target - parts(noise)["semantic"])


def test_a_path_needs_no_network():
    def forbidden(x, t):
        raise AssertionError("evaluated")

    noise, schedule = initial_noise(SEEDS, COMPOSITE), sfd.build_schedule("offset", COMPOSITE.names)
    velocity = follow(forbidden, noise, COMPOSITE, {name: Follow(part) for name, part in parts(LATENTS).items()})
    assert close(integrate(velocity, noise, schedule, COMPOSITE, steps=3).x, LATENTS)


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "dopri5"])
def test_on_straight_paths_a_sample_keeps_itself(solver):
    """The velocity of a single image leads every noise straight to it."""
    noise, schedule = initial_noise(SEEDS, COMPOSITE), sfd.build_schedule("offset", COMPOSITE.names)

    def velocity(x, t):
        return (LATENTS - x) / (1 - COMPOSITE.per_entry(t)).clamp(min=1e-4)

    def run(field):
        return integrate(field, noise, schedule, COMPOSITE, solver=solver, steps=12).x

    sample = run(velocity)
    kept = run(follow(velocity, noise, COMPOSITE, {"semantic": Follow(parts(sample)["semantic"])}))
    assert close(kept, sample, atol=1e-3)


def test_the_plan_is_kept_and_texture_redrawn(model):
    redrawn = keep_plan(model, LATENTS, OTHERS, **STEPS)
    assert close(parts(redrawn)["semantic"], parts(LATENTS)["semantic"])
    again = keep_plan(model, LATENTS, [20, 21, 22], plan_seeds=OTHERS, **STEPS)
    assert (parts(again)["texture"] - parts(redrawn)["texture"]).abs().mean() > 0.1


def test_a_sample_with_its_own_noise_comes_back(shapes):
    classes, seeds = ["star", "heart", "ring", "bar"], [0, 1, 2, 3]
    sample = shapes.sample(classes, seeds=seeds, output="latent")
    unrelated = shapes.sample(classes, seeds=[4, 5, 6, 7], output="latent")
    images, kept, others = (
        torch.from_numpy(shapes.decode(x)).float()
        for x in (sample, keep_plan(shapes, sample, seeds, plan_guidance=1, classes=classes), unrelated)
    )
    assert (kept - images).abs().mean() < 0.15 * (others - images).abs().mean()


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_a_stream_follows_until_its_time(model, solver):
    seen = []
    noise, target = initial_noise(SEEDS, COMPOSITE), parts(LATENTS)["texture"]
    paths = {"texture": Follow(target, until=0.4)}
    velocity = follow(model.velocity_field(torch.tensor([0, 1, 2]), model.config()), noise, COMPOSITE, paths)
    integrate(velocity, noise, model.schedule, COMPOSITE, solver=solver, steps=12, callback=seen.append)
    index = COMPOSITE.index("texture")
    on_path = [p for p in seen if p.t[index] <= 0.4 + 1e-6]
    assert max(p.t[index] for p in on_path) == pytest.approx(0.4, abs=1e-6)  # a step ends there
    for p in seen:
        path = (1 - p.t[index]) * parts(noise)["texture"] + p.t[index] * target
        assert close(parts(p.x)["texture"], path, 1e-4) == (p.t[index] <= 0.4 + 1e-6)


def test_two_clocks_are_plan_keeping_where_texture_starts_from_noise(model):
    both = sdedit(model, LATENTS, {"semantic": 1.0}, SEEDS, **STEPS)
    assert close(both, keep_plan(model, LATENTS, SEEDS, plan_guidance=1, **STEPS))
    plans = initial_noise([30, 31, 32], COMPOSITE)
    other = sdedit(model, LATENTS, {"semantic": 1.0, "texture": 0.5}, SEEDS, plans=plans, **STEPS)
    assert close(parts(other)["semantic"], parts(plans)["semantic"])


def test_plans_are_swapped(model):
    swapped = swap_plans(model, LATENTS[:2], [0, 1], **STEPS)
    assert close(parts(swapped)["semantic"], parts(LATENTS[:2])["semantic"].flip(0))


def test_an_interpolation_ends_in_its_plans(model):
    row = interpolate_plans(model, LATENTS[:2], 5, count=4, plan_seeds=[3, 4], **STEPS)
    ends = keep_plan(model, LATENTS[:2], [5, 5], plan_seeds=[3, 4], **STEPS)
    assert len(row) == 4 and close(row[[0, -1]], ends, 1e-4)
    norms = parts(row)["semantic"].flatten(1).norm(dim=1)
    assert norms.min() > 0.9 * norms[[0, -1]].min()


def test_a_brush_redraws_where_it_went(model):
    brush = torch.zeros(8, 8)
    brush[:4, :4] = 1  # the first of 2 × 2 positions
    for keep_texture in (True, False):
        painted = parts(paint(model, LATENTS, brush, OTHERS, keep_texture=keep_texture, **STEPS))
        for name, source in parts(LATENTS).items():
            changed = (painted[name] - source).abs().mean((0, 1))
            assert changed[0, 0] > 0.05
            kept = changed[[0, 1, 1], [1, 0, 1]]
            assert (kept < 1e-5).all() if keep_texture or name == "semantic" else (kept > 0.05).all()


def test_an_image_does_not_depend_on_its_batch(model):
    masks = torch.stack([torch.eye(2), torch.ones(2, 2), torch.zeros(2, 2)])
    how = STEPS | {"guidance": {"texture": 1.5}, "interval": {"texture": (0.2, 0.7)}, "classes": [0, 1, 2]}
    together = keep_plan(model, LATENTS, SEEDS, where=masks, **how)
    assert close(together, keep_plan(model, LATENTS, SEEDS, where=masks, batch_size=2, **how))


def test_another_schedule_may_show_texture_a_clearer_plan(model):
    own, same, larger = (
        keep_plan(model, LATENTS, SEEDS, schedule=spec, **STEPS)
        for spec in (None, {"name": "offset", "delta": 0.3}, {"name": "offset", "delta": 0.6})
    )
    assert close(same, own) and not close(larger, own, 1e-2)
    assert close(parts(larger)["semantic"], parts(LATENTS)["semantic"])


def test_noise_is_mixed_by_stream():
    mixed = parts(mixed_noise(COMPOSITE, SEEDS, OTHERS))
    assert close(mixed["texture"], parts(initial_noise(SEEDS, COMPOSITE))["texture"])
    assert close(mixed["semantic"], parts(initial_noise(OTHERS, COMPOSITE))["semantic"])


REFUSED = {
    "solver": (lambda m: keep_plan(m, LATENTS, SEEDS, solver="sde"), "sde"),
    "stream": (lambda m: sdedit(m, LATENTS, {"textur": 0.5}, SEEDS), "texture"),
    "time": (lambda m: sdedit(m, LATENTS, {"texture": 1.5}, SEEDS), "1.5"),
    "base time": (lambda m: sdedit(m, LATENTS, -1.0, SEEDS), "-1"),
    "count": (lambda m: keep_plan(m, LATENTS, [0]), "(1, 3, 2, 2)"),
    "seeds": (lambda m: change_plan(m, SEEDS, [0]), "as many"),
    "classes": (lambda m: change_plan(m, SEEDS, SEEDS, classes=[0, 1]), "2 classes"),
    "mask": (lambda m: keep_plan(m, LATENTS, SEEDS, where=torch.zeros(2)), "(2,)"),
    "masks": (lambda m: keep_plan(m, LATENTS, SEEDS, where=torch.zeros(2, 2, 2)), "2 masks"),
    "swap": (lambda m: swap_plans(m, LATENTS, SEEDS), "got 3"),
}


@pytest.mark.parametrize(("call", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(model, call, hint):
    with pytest.raises(SFDError) as error:
        call(model)
    assert hint in str(error.value)


def test_a_distilled_model_is_refused():
    distilled = random_model(0, network={"flow_map": (0.0, 0.5, 1.0)})
    with pytest.raises(SFDError, match="distilled"):
        change_plan(distilled, SEEDS, OTHERS)


def test_texture_alone_has_no_plan():
    alone = random_model(0, composite=CompositeLatent(streams=(TEXTURE,)), name="synchronous")
    with pytest.raises(SFDError, match="two streams"):
        keep_plan(alone, initial_noise(SEEDS, alone.composite), SEEDS)
    assert edit(alone, initial_noise(SEEDS, alone.composite), {}, steps=2).shape == (3, TEXTURE.size)
