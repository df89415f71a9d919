"""From labels and seeds to images, through a small network with weights that no training gave it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from random_model import CLASSES, COMPOSITE, DELTA, SEMANTIC, TEXTURE, random_model
from sfd.generation.generate import SamplingConfig, decode, generate, velocity_field
from sfd.generation.model import Model
from sfd.latents import CompositeLatent
from sfd.sampling import initial_noise
from sfd.utils.errors import SFDError

SEEDS, LABELS = [5, 0, 9], [2, 0, 1]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(0)


@pytest.fixture(scope="module")
def weak() -> Model:
    return random_model(1)


def latents(model: Model, weak: Model | None = None, labels=LABELS, seeds=SEEDS, **settings) -> Tensor:
    """(B, N), sampled by Euler with one step in each segment unless told otherwise."""
    chosen = SamplingConfig(**{"solver": "euler", "steps": 3, **settings})
    return torch.cat([g.latents for g in generate(model, labels, seeds, chosen, weak=weak)])


def by_hand(model: Model, other: Model, other_labels: list[int], scales: list[float], intervals=None) -> Tensor:
    """Euler by the paper's formulas, one step from each knot or end of an interval to the next.

    v = v_w + g·(v_c − v_w) for each stream that is inside its interval halfway through the step.
    """
    x, end = initial_noise(SEEDS, COMPOSITE), 1 + DELTA
    texture, semantic = intervals or [(0, 1)] * 2
    knots = [0.0, DELTA / end, 1 / end, 1.0]
    stops = {*knots, *((t + DELTA) / end for t in texture), *(t / end for t in semantic)}

    def times_at(u: float) -> list[float]:
        return [max(0.0, end * u - DELTA), min(1.0, end * u)]

    for u, after in itertools.pairwise(sorted(stops)):
        times = torch.tensor(times_at(u))
        rates = torch.tensor([0.0 if u < knots[1] else end, end if u < knots[2] else 0.0])
        with torch.no_grad():
            v_c = model.transformer(x, times.expand(3, 2), torch.tensor(LABELS)).velocity
            v_w = other.transformer(x, times.expand(3, 2), torch.tensor(other_labels)).velocity
        halfway = zip(times_at((u + after) / 2), (texture, semantic), scales, strict=True)
        g = torch.tensor([s if low <= t <= high else 1.0 for t, (low, high), s in halfway])
        x = x + (after - u) * COMPOSITE.per_entry(rates) * (v_w + COMPOSITE.per_entry(g) * (v_c - v_w))
    return x


class Calls:
    """Counts how often a model's network is called."""

    def __init__(self, model: Model) -> None:
        self.count = 0
        self.hook = model.transformer.register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5])
def test_guidance_by_the_null_class_is_its_formula(model, scale):
    null = [len(CLASSES)] * 3
    expected = by_hand(model, model, null, [scale, scale])
    torch.testing.assert_close(latents(model, guidance=scale), expected, rtol=1e-4, atol=1e-5)


def test_guidance_by_the_null_class_changes_the_result(model):
    assert (latents(model, guidance=2.5) - latents(model)).abs().max() > 0.01


def test_guidance_by_a_weak_model_is_its_formula_with_the_same_class(model, weak):
    expected = by_hand(model, weak, LABELS, [1.7, 1.7])
    torch.testing.assert_close(latents(model, weak, guidance=1.7), expected, rtol=1e-4, atol=1e-5)


def test_a_weak_model_is_not_the_null_class(model, weak):
    assert (latents(model, weak, guidance=1.7) - latents(model, guidance=1.7)).abs().max() > 0.01


def test_the_model_itself_as_weak_model_changes_nothing(model):
    torch.testing.assert_close(latents(model, model, guidance=1.7), latents(model), rtol=1e-4, atol=1e-5)


def test_scales_differ_by_stream(model, weak):
    expected = by_hand(model, weak, LABELS, [1.3, 1.9])
    given = {"semantic": 1.9, "texture": 1.3}
    torch.testing.assert_close(latents(model, weak, guidance=given), expected, rtol=1e-4, atol=1e-5)


def test_scale_one_never_asks_the_weak_model(model, weak):
    with Calls(weak) as calls, Calls(model) as own:
        latents(model, weak, guidance={"semantic": 1.0, "texture": 1.0})
    assert (calls.count, own.count) == (0, 3)


def test_guidance_holds_inside_the_interval_only(model, weak):
    # Of six steps one is in the semantic interval, and two are in the texture's.
    intervals = [(0.5, 1.0), (0.2, 0.35)]
    expected = by_hand(model, weak, LABELS, [2.0, 2.0], intervals)
    given = {"texture": intervals[0], "semantic": intervals[1]}
    with Calls(weak) as calls:
        result = latents(model, weak, guidance=2.0, interval=given, steps=6)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert calls.count == 4
    assert (result - latents(model, weak, guidance=2.0, steps=6)).abs().max() > 0.01


def test_steps_too_few_for_an_interval_are_refused_at_once(model, weak):
    with Calls(model) as calls, pytest.raises(SFDError, match=r"semantic at 0.2 and 0.8.* give at least 5"):
        latents(model, weak, guidance={"semantic": 2.0}, interval=(0.2, 0.8), steps=4)
    assert calls.count == 0


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_an_image_does_not_depend_on_its_batch(model, weak, batch_size):
    seeds, labels = list(range(7)), [0, 1, 2, 2, 1, 0, 3]
    given = {"labels": labels, "seeds": seeds, "guidance": 1.5, "solver": "heun", "steps": 6}
    whole = latents(model, weak, **given)
    torch.testing.assert_close(latents(model, weak, batch_size=batch_size, **given), whole, rtol=1e-5, atol=1e-5)


def test_batches_are_numbered_and_decoded(model):
    settings = SamplingConfig(steps=3, batch_size=2)
    batches = list(generate(model, LABELS, SEEDS, settings))
    assert [b.first for b in batches] == [0, 2]
    assert [b.images.shape for b in batches] == [(2, 4, 4, 3), (1, 4, 4, 3)]
    assert (batches[1].images == decode(model, batches[1].latents)).all()


def test_the_label_and_the_seed_matter(model):
    plain = latents(model)
    assert (latents(model, labels=[1, 0, 1])[0] - plain[0]).abs().max() > 0.01
    assert (latents(model, seeds=[6, 0, 9])[0] - plain[0]).abs().max() > 0.01


def test_bf16_is_close_to_float32(model):
    x, times = initial_noise(SEEDS, COMPOSITE), torch.tensor([0.3, 0.6])
    exact, rough = (velocity_field(model.inference(p), torch.tensor(LABELS))(x, times) for p in ("float32", "bf16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert (exact - rough).abs().max() < 0.05 * exact.abs().max()


def test_an_unconditional_model_cannot_guide_itself():
    unconditional = random_model(0, classes=())
    with pytest.raises(SFDError, match="needs a weak model"):
        latents(unconditional, labels=[0, 0, 0], guidance=1.5)
    assert latents(unconditional, labels=[0, 0, 0]).isfinite().all()


def test_an_unconditional_model_is_guided_by_a_weak_one():
    strong, weak = random_model(0, classes=()), random_model(1, classes=())
    difference = latents(strong, weak, labels=[0, 0, 0], guidance=1.5) - latents(strong, labels=[0, 0, 0])
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": ("disk", "ring")}, "has classes disk, ring, the guided one disk, ring, star"),
        ({"composite": CompositeLatent(streams=(TEXTURE,)), "name": "synchronous"}, "other streams"),
        ({"composite": CompositeLatent(streams=(SEMANTIC, TEXTURE))}, "other streams"),
        (
            {"composite": CompositeLatent(streams=(TEXTURE.model_copy(update={"std": (0.7, 0.6)}), SEMANTIC))},
            r"stream 'texture' of the guiding model has std \(0.7, 0.6\), of the guided one \(0.7, 0.5\)",
        ),
        (
            {"composite": CompositeLatent(streams=(TEXTURE, SEMANTIC.model_copy(update={"channels": 4})))},
            "stream 'semantic' of the guiding model has shape",
        ),
        (
            {"composite": CompositeLatent(streams=(TEXTURE, SEMANTIC.model_copy(update={"tokenizer": "other"})))},
            "stream 'semantic' of the guiding model has tokenizer other",
        ),
    ],
    ids=["classes", "fewer streams", "order", "statistics", "shape", "tokenizer"],
)
def test_a_weak_model_of_other_latents_is_refused(model, changed, message):
    other = random_model(1, **changed)
    with Calls(model) as calls, pytest.raises(SFDError, match=message):
        latents(model, other, guidance=1.5)
    assert calls.count == 0


def test_a_label_for_each_seed(model):
    with pytest.raises(SFDError, match="2 labels were given for 3 seeds"):
        latents(model, labels=[0, 1])


def test_one_call_of_twice_the_batch_guides_the_same(model):
    with Calls(model) as calls:
        paired = latents(model, guidance=2.5, paired=True)
    assert calls.count == 3
    torch.testing.assert_close(paired, latents(model, guidance=2.5), rtol=1e-5, atol=1e-5)


def test_the_weak_model_is_not_asked_for_a_stream_at_rest(model, weak):
    """Semantics move in two of three segments."""
    with Calls(weak) as calls:
        latents(model, weak, guidance={"semantic": 2.0})
    assert calls.count == 2


def test_the_weak_model_is_asked_less_often(model, weak):
    settings = SamplingConfig(solver="euler", steps=13, guidance=2.0, weak_every=3)
    with Calls(weak) as calls:
        (batch,) = generate(model, LABELS, SEEDS, settings, weak=weak)
    assert (batch.evaluations, batch.weak_evaluations, calls.count) == (13, 5, 5)  # 1 + 3 + 1: anew in each segment


def test_an_image_with_steps_of_its_own_does_not_depend_on_its_batch(model, weak):
    given = {"guidance": 1.5, "solver": "dopri5", "steps": None, "options": {"control": "image"}}
    alone = torch.cat(
        [latents(model, weak, labels=[c], seeds=[s], **given) for c, s in zip(LABELS, SEEDS, strict=True)]
    )
    torch.testing.assert_close(latents(model, weak, **given), alone, rtol=1e-4, atol=1e-4)


def test_noise_on_the_way_does_not_depend_on_the_batch(model):
    given = {"solver": "sde", "steps": 6}
    torch.testing.assert_close(latents(model, batch_size=2, **given), latents(model, **given), rtol=1e-5, atol=1e-5)
    assert (latents(model, **given) - latents(model, solver="heun", steps=6)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weak_every": 2}, "there is no weak model to ask"),
        ({"paired": True}, "there is no weak model to ask"),
        ({"weak_every": 2, "guidance": 2.0, "solver": "dopri5", "steps": None}, "a weak velocity that is reused"),
        ({"paired": True, "guidance": 2.0}, "but the weak model is another"),
    ],
)
def test_savings_that_cannot_be_are_refused(model, weak, settings, message):
    with pytest.raises(SFDError, match=message):
        latents(model, weak, **settings)
