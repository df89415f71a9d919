"""Fine-tuning against training from scratch: models/shapes on two kinds of shape that it never saw, at equal steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.measure import ROOT, Row, Setting
from benchmarks.quality import reference
from sfd.data.folder import write_folder
from sfd.data.images import Indices, stable_hash
from sfd.data.shapes import ShapesSource, render
from sfd.evaluation.evaluate import Metrics, evaluate, read_metrics
from sfd.evaluation.reference import reference_of
from sfd.generation.model import Model
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import Recipe, load_recipe

RECIPE = ROOT / "recipes" / "fine-tune.yaml"
IMAGES, REFERENCE, SAMPLES, SEEDS = 600, 4000, 500, (0, 1, 2)
CHANGES = ("train.steps=240", "train.decay_from=120", "train.preview_every=0", "evaluation.classifier=null")
WAYS = {"fine-tuned": "shapes", "from scratch": None}  # model to start from


class NewShapes(ShapesSource):
    """Frames (a square with a square hole) and hexagrams (a triangle and the same upside down), textured as shapes."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        self.kinds, self.classes = self.classes, ("frame", "hexagram")
        self.identity = stable_hash("frames and hexagrams", count=count, seed=seed)

    @property
    def labels(self) -> np.ndarray:
        """(count,) int64."""
        return super().labels % 2

    def load(self, indices: Indices) -> np.ndarray:
        """Render the images at `indices`. Returns uint8 (B, 32, 32, 3)."""
        factors, labels = self.factors(indices), self.labels[np.asarray(indices)]
        whole, hole = self._cover(factors, "square"), self._cover(factors, "square", size=0.55)
        upright, turned = self._cover(factors, "triangle"), self._cover(factors, "triangle", turn=np.pi)
        cover = np.where(labels[:, None, None, None] == 0, whole - hole, np.maximum(upright, turned))
        figure, ground = (self._painted(factors, layer) for layer in ("figure", "ground"))
        return (ground + cover * (figure - ground)).round().astype(np.uint8)

    def _cover(self, factors: np.ndarray, kind: str, size: float = 1.0, turn: float = 0.0) -> np.ndarray:
        """Share of each pixel that a shape covers."""
        shape = factors.copy()
        shape["shape"], shape["figure"]["pattern"], shape["ground"]["pattern"] = self.kinds.index(kind), 0, 0
        shape["figure"]["colours"], shape["ground"]["colours"] = 1, 0
        shape["radius"] *= size
        shape["rotation"] += turn
        return render(shape, self.image_size) / 255.0

    def _painted(self, factors: np.ndarray, layer: str) -> np.ndarray:
        """The texture of a layer over the whole image."""
        texture = factors.copy()
        texture["figure"] = texture["ground"] = factors[layer]
        return render(texture, self.image_size).astype(np.float64)


def finetune(setting: Setting, seeds: tuple[int, ...] = SEEDS) -> list[Row]:
    """Train and evaluate each way with each seed; FIELD=VALUE changes the recipe. The same command resumes."""
    folder = setting.out / "finetune"
    if not (folder / "images").exists():
        write_folder(NewShapes(IMAGES, seed=0), folder / "images")
    judge = reference(setting).extractor
    against = reference_of(NewShapes(REFERENCE, seed=1), judge, "images that nothing was trained on")
    real = evaluate(NewShapes(SAMPLES, seed=2), None, against, name="real images", real=True)
    rows = []
    for way in WAYS:
        for seed in seeds:
            path = folder / "results" / f"{way.replace(' ', '-')}-{seed}.json"
            if not path.exists():
                model = trained(recipe(way, folder / "images", seed, setting.overrides), path.with_suffix(""), setting)
                labels = [k % len(model.classes) for k in range(SAMPLES)]
                batches = model.sample_batches(labels, range(SAMPLES), model.config(batch_size=250))
                evaluate(np.concatenate([b.images for b in batches]), None, against, name=way).write(path)
            rows.append({"way": way, "seed": seed} | _distance(read_metrics(path)))
    return [*rows, {"way": "real images", "seed": None} | _distance(real)]


def recipe(way: str, images: Path, seed: int, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe for fine-tuning; from scratch, the same without the weights of the transformer."""
    tuned = load_recipe(RECIPE, [f"data.source={images}", "train.init=shapes", f"seed={seed}", *CHANGES, *overrides])
    return tuned.model_copy(update={"train": tuned.train.model_copy(update={"init": WAYS[way]})})


def trained(given: Recipe, folder: Path, setting: Setting) -> Model:
    """Encode the images and train the transformer."""
    pipeline = Pipeline(given, folder, setting.device)
    pipeline.make_model()
    return pipeline.model


def _distance(seen: Metrics) -> Row:
    low, high = seen.intervals["frechet_distance"]
    return {"n_samples": seen.n_samples, "frechet_distance": seen.frechet_distance, "low": low, "high": high}
