"""How far ahead should semantics run? One transformer per offset Δ on the same latents, evaluated by its samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.demo import RECIPE
from benchmarks.measure import Row, Setting
from sfd.data.shards import LatentSet
from sfd.evaluation.evaluate import Metrics, evaluate, read_metrics
from sfd.evaluation.reference import Reference
from sfd.generation.model import Model
from sfd.models.dit import LightningDiT
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import Recipe, load_recipe
from sfd.run.transformer import transformer_config
from sfd.schedule import build_schedule
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.trainer import fit

RUNS = ((0.0, 0), (0.3, 0), (0.3, 1), (1.0, 0))  # Δ and seed
RECIPE_CHANGES = ("train.steps=600", "train.batch_size=128", "train.decay_from=360", "evaluation.samples_per_class=100")


def offset_sweep(setting: Setting, recipe: Path = RECIPE, runs: tuple[tuple[float, int], ...] = RUNS) -> list[Row]:
    """Train and evaluate; FIELD=VALUE changes the recipe.

    Encoders, latents and evaluator are trained once. A seed sets the initial weights and every draw of the
    transformer's training, the same for all Δ. Samples are unguided. Each result is written as it comes: the same
    command resumes.
    """
    changes = [*(RECIPE_CHANGES if recipe == RECIPE else ()), *setting.overrides, "train.preview_every=0"]
    folder = setting.out / "offset-sweep"
    pipeline, against = parts(load_recipe(recipe, changes), folder / "parts", setting.device)
    rows = []
    for delta, seed in runs:
        name = f"delta-{delta:g}-seed-{seed}"
        path = folder / "results" / f"{name}.json"
        if not path.exists():
            evaluated(pipeline, trained(pipeline, delta, seed, folder / name), against, name).write(path)
        seen = read_metrics(path)
        row = {"delta": delta, "seed": seed, "n_samples": seen.n_samples, "class_accuracy": seen.class_accuracy}
        row |= {"frechet_distance": seen.frechet_distance, "precision": seen.precision, "recall": seen.recall}
        rows.append(row)
    return rows


def parts(recipe: Recipe, folder: Path, device: torch.device) -> tuple[Pipeline, Reference]:
    """A run with all of its parts but the transformer, and what its samples are compared with."""
    pipeline = Pipeline(recipe, folder, device)
    for stage in (pipeline.texture, pipeline.semantic, pipeline.compressor, pipeline.latents, pipeline.evaluator):
        stage.make()
    return pipeline, pipeline.evaluator.reference()


def trained(pipeline: Pipeline, delta: float, seed: int, folder: Path) -> Model:
    """Train a transformer with this offset on the prepared latents."""
    recipe, latents = pipeline.recipe, LatentSet(pipeline.folder.latents)
    config = transformer_config(recipe, latents)
    schedule = build_schedule({"name": "offset", "delta": delta}, config.composite.names)
    network, size = LightningDiT(config, seed=seed), recipe.train.batch_size
    task = DiffusionTask(network, latents, schedule, recipe.loss, seed=seed, batch_size=size)
    network = fit(task, recipe.train, folder, device=pipeline.device)
    return Model(network, schedule, pipeline.texture.encoder, latents.manifest.classes)


def evaluated(pipeline: Pipeline, model: Model, against: Reference, name: str) -> Metrics:
    """Sample without guidance, the same seeds and classes for every model, and evaluate."""
    settings = pipeline.recipe.sample.unguided()
    labels = [c for c in range(len(model.classes)) for _ in range(pipeline.recipe.evaluation.samples_per_class)]
    images = np.concatenate([b.images for b in model.sample_batches(labels, range(len(labels)), settings)])
    return evaluate(images, labels, against, name=name, sampling=settings.model_dump(mode="json"))
