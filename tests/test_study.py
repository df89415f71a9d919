"""The study in toy sizes: it runs, resumes, shares parts, and says what its numbers say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.measure import MODEL
from benchmarks.probe import Probe
from benchmarks.study import __main__ as study
from benchmarks.study import semantics
from benchmarks.study.arms import BASES, arms
from benchmarks.study.page import Results, Value, reached, verdict
from benchmarks.study.semantics import on_semantics
from benchmarks.study.work import FEW, REAL, SCALES, WEAK
from sfd.data.folder import FolderSource
from sfd.evaluation.extractors._base import Extraction
from sfd.generation.model import load_model
from sfd.latents import SEMANTIC, TEXTURE
from sfd.run.recipe import load_recipe

TOY = [
    "data={source: shapes, image_size: 32, count: 400, holdout: 0.5, seed: 0}",
    *(f"{part}.train={{steps: 2, batch_size: 8, learning_rate: 1.0e-3}}" for part in ("texture", "semantic")),
    "train={steps: 4, batch_size: 8, learning_rate: 1.0e-3, preview_every: 2, keep_every: 2}",
    "transformer={size: tiny, depth: 1, repa_block: 1, repa_width: 8, width: 16, heads: 2}",
    "sample={steps: 3, solver: euler}",
    "evaluation={samples_per_class: 2, classifier: {training: {steps: 2, batch_size: 8, learning_rate: 1.0e-3}}}",
]


@pytest.mark.parametrize("name", BASES)
def test_every_arm_has_a_valid_recipe_of_its_own(name):
    base = BASES[name]
    listed = arms(base)
    assert len({arm.name for arm in listed}) == len(listed)
    recipes = {arm.name: load_recipe(base.recipe, [*base.changes, *arm.changes]).fixed() for arm in listed}
    assert recipes.pop("learned") == recipes["density-0.3"]  # whose schedule a probe replaces
    assert len({json.dumps(recipe, sort_keys=True) for recipe in recipes.values()}) == len(recipes)
    assert len({json.dumps([recipe["train"], recipe["transformer"]["depth"]]) for recipe in recipes.values()}) == 1


@pytest.mark.slow
def test_it_measures_resumes_and_shares(tmp_path):
    rest = ["--out", str(tmp_path), "--device", "cpu"]
    command = ["shapes", *TOY, "--arms", "offset-0.3,learned", "--seeds", "2", *rest]
    study.main(command)
    results = sorted((tmp_path / "shapes/results").glob("*.seed-*"))
    assert len(results) == 2 * 2 * (len(SCALES) + len(FEW) + len(WEAK) + 1)  # arms, seeds, samplings, preview
    assert len(list((tmp_path / "shapes/parts").glob("latents-*"))) == 1
    page = (tmp_path / "study-shapes.md").read_text(encoding="utf-8")
    assert all((tmp_path / f"shapes/results/{name}.json").exists() for name in REAL)
    assert "| offset-0.3 | 2 |" in page and (tmp_path / "study-shapes.png").exists()

    semantics.main(["shapes", *TOY, "--arms", "offset-0.3", "--seeds", "1", *rest])
    seen = json.loads((tmp_path / "shapes/semantics/offset-0.3.seed-0.json").read_text(encoding="utf-8"))
    shares = {row["semantics"]: row["share_of_classes_right"] for row in seen["rows"]}
    assert all(0 <= shares[kind] <= 1 for kind in ("own", "of real images"))
    study.main(command)
    assert "of the early network" in (tmp_path / "study-shapes.md").read_text(encoding="utf-8")

    results[0].unlink()
    before = {path: path.stat().st_mtime_ns for path in results[1:]}
    study.main(command)
    assert results[0].exists()
    assert {path: path.stat().st_mtime_ns for path in results[1:]} == before
    values = Results(tmp_path / "shapes")
    seen = values.found["learned"]["guidance-1"]
    assert values.value("learned", "frechet_distance").mean == pytest.approx(
        (seen[0].frechet_distance + seen[1].frechet_distance) / 2
    )


def test_texture_is_drawn_on_the_semantics_that_are_given():
    model = load_model(MODEL, torch.device("cpu"))
    labels, seeds, config = [0, 1, 2], range(3), model.config(steps=6, batch_size=2)
    true = torch.randn(3, *model.composite[SEMANTIC].shape, generator=torch.Generator().manual_seed(0))
    sampled = model.composite.unpack(on_semantics(model, true, labels, seeds, config))
    torch.testing.assert_close(sampled[SEMANTIC], true, rtol=0, atol=1e-5)
    plain = model.sample(labels, list(seeds), output="latent", steps=6, batch_size=2)
    assert not torch.allclose(sampled[TEXTURE], model.composite.unpack(plain)[TEXTURE], atol=0.1)


def test_an_interval_covers_what_arms_and_seeds_leave_unexplained(tmp_path):
    results = Results(tmp_path)
    for arm, values in {"a": (1.0, 3.0), "b": (5.0, 9.0), "c": (4.0,)}.items():
        for seed, value in enumerate(values):
            metrics = SimpleNamespace(recall=value, intervals={"recall": (value - 0.1, value + 0.1)})
            results.found[arm]["guidance-1"][seed] = metrics
    one = 12.71  # one degree of freedom; residuals of ±1/2
    assert results.value("a", "recall") == Value(2.0, pytest.approx(one / 2**0.5))
    assert results.value("c", "recall") == Value(4.0, pytest.approx(one))
    assert results.value("b", "recall", seeds={1}).mean == 9.0


def test_an_ordering_holds_only_where_intervals_are_apart():
    low, high = Value(10, 1), Value(13, 1)
    assert verdict(low, high, lower=True) == "holds"
    assert verdict(high, low, lower=True) == "the reverse holds"
    assert verdict(low, high, lower=False) == "the reverse holds"
    assert verdict(low, Value(13, 2.5), lower=True) == "not separated"
    assert verdict(low, None, lower=True) == "not measured"


def test_images_until_a_distance_is_reached():
    curve = [(100, 40.0), (200, 20.0), (400, 10.0)]  # distance · images is constant
    assert reached(curve, 16) == pytest.approx(250)
    assert reached(curve, 50) == 100
    assert reached(curve, 5) is None


class Colours:
    """An extractor of mean colours."""

    name = identity = "colours"

    def extract(self, images):
        return Extraction(features=images.mean(axis=(1, 2)).astype(np.float32), probabilities=None)


def test_a_probe_learns_classes_from_features(tmp_path):
    def source(seed):
        labels = np.arange(60) % 3
        images = np.random.default_rng(seed).integers(100, size=(60, 8, 8, 3), dtype=np.uint8)
        images[np.arange(60), ..., labels] += 100
        folder = tmp_path / str(seed)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            (folder / "rgb"[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "rgb"[label] / f"{number}.png")
        return FolderSource(folder, 8)

    training, unseen = source(0), source(1)
    probe = Probe(Colours(), training, unseen, tmp_path / "features")
    assert (probe.accuracy, probe.trained_on, probe.classes) == (1.0, 60, ("b", "g", "r"))
    seen = probe.extract(unseen.load(range(10)))
    assert (seen.probabilities.argmax(axis=1) == np.asarray(unseen.labels)[:10]).all()
