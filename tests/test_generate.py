"""From labels and seeds to images through a small random network: guidance, intervals, batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.random_model import CLASSES, COMPOSITE, DELTA, SEMANTIC, TEXTURE, random_model
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.latents import CompositeLatent
from sfd.sampling import initial_noise
from sfd.utils.errors import SFDError

SEEDS, LABELS = [5, 0, 9], [2, 0, 1]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(0)


@pytest.fixture(scope="module")
def guiding() -> Model:
    return random_model(1)


def latents(model: Model, guiding: Model | None = None, labels=LABELS, seeds=SEEDS, **settings) -> Tensor:
    """(B, N), by default sampled by Euler with one step per segment."""
    source = {} if guiding is None else {"guidance_from": "guiding_model"}
    config = SamplingConfig(**{"solver": "euler", "steps": 3, **source, **settings})
    return torch.cat([batch.latents for batch in model.sample_batches(labels, seeds, config, guiding=guiding)])


def by_hand(model: Model, other: Model, other_labels: list[int], scales: list[float], intervals=None) -> Tensor:
    """Euler by the paper's formulas, one step from each knot or end of an interval to the next.

    v = v_g + w·(v_c − v_g) for each stream that is inside its interval halfway through the step.
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
            v_g = other.transformer(x, times.expand(3, 2), torch.tensor(other_labels)).velocity
        halfway = zip(times_at((u + after) / 2), (texture, semantic), scales, strict=True)
        w = torch.tensor([s if low <= t <= high else 1.0 for t, (low, high), s in halfway])
        x = x + (after - u) * COMPOSITE.per_entry(rates) * (v_g + COMPOSITE.per_entry(w) * (v_c - v_g))
    return x


class Calls:
    """Counts the calls of a model's network."""

    def __init__(self, model: Model) -> None:
        self.model, self.count = model, 0

    def __enter__(self) -> Calls:
        self.hook = self.model.transformer.register_forward_hook(lambda *_: setattr(self, "count", self.count + 1))
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5])
def test_guidance_by_the_null_class_equals_its_formula_in_one_call(model, scale):
    expected = by_hand(model, model, [len(CLASSES)] * 3, [scale, scale])
    with Calls(model) as calls:
        result = latents(model, guidance=scale)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert calls.count == 3


@pytest.mark.parametrize("scales", [[1.7, 1.7], [1.3, 1.9]])
def test_guidance_by_another_model_equals_its_formula_with_the_same_class(model, guiding, scales):
    expected = by_hand(model, guiding, LABELS, scales)
    given = dict(zip(COMPOSITE.names, scales, strict=True))
    result = latents(model, guiding, guidance=given)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert (result - latents(model, guidance=given)).abs().max() > 0.01, "the guiding model is not the null class"


def test_a_trajectory_is_guided_as_its_sample(model, guiding):
    given = {"seeds": SEEDS[:2], "guiding": guiding, "guidance": 2.0, "steps": 6}
    (*_, last) = model.trajectory(0, **given)
    torch.testing.assert_close(last.x.cpu(), model.sample(0, output="latent", **given))


def test_scale_one_never_calls_the_guiding_model(model, guiding):
    with Calls(guiding) as calls, Calls(model) as own:
        latents(model, guiding, guidance={"semantic": 1.0, "texture": 1.0})
    assert (calls.count, own.count) == (0, 3)


def test_guidance_is_restricted_to_the_interval(model, guiding):
    # Of six steps one is in the semantic interval and two are in the texture's.
    intervals = [(0.5, 1.0), (0.2, 0.35)]
    expected = by_hand(model, guiding, LABELS, [2.0, 2.0], intervals)
    given = {"texture": intervals[0], "semantic": intervals[1]}
    with Calls(guiding) as calls:
        result = latents(model, guiding, guidance=2.0, interval=given, steps=6)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert calls.count == 4
    assert (result - latents(model, guiding, guidance=2.0, steps=6)).abs().max() > 0.01


def test_the_guiding_model_is_not_called_for_a_stream_at_rest(model, guiding):
    with Calls(guiding) as calls:
        latents(model, guiding, guidance={"semantic": 2.0})
    assert calls.count == 2  # semantics move in two of three segments


def test_too_few_steps_are_refused_before_the_first_evaluation(model, guiding):
    with Calls(model) as calls, pytest.raises(SFDError, match="at least 5"):
        latents(model, guiding, guidance={"semantic": 2.0}, interval=(0.2, 0.8), steps=4)
    assert calls.count == 0


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("solver", ["heun", "sde"])
def test_an_image_does_not_depend_on_its_batch(model, guiding, batch_size, solver):
    seeds, labels = list(range(7)), [0, 1, 2, 2, 1, 0, 3]
    given = {"labels": labels, "seeds": seeds, "guidance": 1.5, "solver": solver, "steps": 6}
    whole = latents(model, guiding, **given)
    torch.testing.assert_close(latents(model, guiding, batch_size=batch_size, **given), whole, rtol=1e-5, atol=1e-5)


def test_latents_are_decoded_in_small_batches(monkeypatch):
    model, sizes = random_model(0), []
    packed = initial_noise(range(70), model.composite)
    one_by_one = np.concatenate([model.decode(packed[i : i + 1]) for i in range(70)])
    decode = model.texture.decode
    monkeypatch.setattr(model.texture, "decode", lambda z: (sizes.append(len(z)), decode(z))[1])
    assert abs(model.decode(packed).astype(int) - one_by_one).max() <= 1
    assert sum(sizes) == 70 and max(sizes) <= 32


def test_an_unconditional_model_is_guided_only_by_another_model(guiding):
    unconditional, other = (random_model(seed, classes=()) for seed in (0, 1))
    given = {"labels": [0, 0, 0], "guidance": 1.5}
    with pytest.raises(SFDError, match="guiding model"):
        latents(unconditional, **given)
    difference = latents(unconditional, other, **given) - latents(unconditional, labels=[0, 0, 0])
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize(
    "changed",
    [
        {"classes": ("disk", "ring")},
        {"composite": CompositeLatent(streams=(SEMANTIC, TEXTURE))},
        {"composite": CompositeLatent(streams=(TEXTURE.model_copy(update={"std": (0.7, 0.6)}), SEMANTIC))},
        {"composite": CompositeLatent(streams=(TEXTURE, SEMANTIC.model_copy(update={"tokenizer": "other"})))},
    ],
    ids=["classes", "order", "statistics", "tokenizer"],
)
def test_a_guiding_model_of_other_latents_is_refused(model, changed):
    with Calls(model) as calls, pytest.raises(SFDError, match="guiding model"):
        latents(model, random_model(1, **changed), guidance=1.5)
    assert calls.count == 0


def test_settings_of_earlier_versions_are_read():
    earlier = SamplingConfig.model_validate({"steps": None, "batch_size": None, "compile": "auto"})
    assert earlier == SamplingConfig()
    assert SamplingConfig.model_validate({"compile": "on"}).compile
