"""Fewer network calls at what quality: a distilled model at 8 to 1 steps, and guidance by a second head.

Both train what they need in `--out`, from models/shapes but for a guiding network, and resume.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.measure import MODEL, ROOT, Row, Setting, best_times
from benchmarks.quality import reference
from sfd.data.shards import LatentSet
from sfd.evaluation.evaluate import evaluate
from sfd.evaluation.reference import Reference
from sfd.generation.model import Model, load_model
from sfd.models.dit import LightningDiT
from sfd.run.distill import distill, read_settings
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.trainer import fit

SAMPLES, AT_ONCE, TIMED = 1000, 250, 50
TEACHER = {"steps": 24, "guidance": 2.0}
DISTILLED = ["teacher.guidance=2", "teacher.steps=24", "teacher.precision=bf16", "teacher.batch_size=128"]
DISTILLED += ["trajectories=20480", "train.steps=3000", "train.learning_rate=1e-3", "train.warmup=200"]
DISTILLED += ["train.ema_warmup=true", "train.precision=bf16"]
TOKENIZERS = ("texture", "semantic", "compressor")
HEAD = ["data.count=20000", "latents.features=false", "loss.repa=0", "transformer.guide_block=2", "loss.guide=0.25"]
HEAD += ["train.steps=400", "train.learning_rate=5e-4", "train.warmup=50", "train.decay_from=100", "train.ema=0.99"]
HEAD += ["train.preview_every=0", "sample.guidance_from=inside", f"train.init={MODEL}"]
SCALES = (1.0, 1.5, 2.0, 3.0)
CALLS = {"null_class": 2, "inside": 1, "guiding_model": 2}  # of networks, per step


def few_steps(setting: Setting) -> list[Row]:
    """The guided teacher, and its student in 8, 4, 2 and 1 steps; the same seeds and classes."""
    teacher, against = load_model(MODEL, setting.device), reference(setting)
    compiled = [f"{part}.compile={str(setting.compiles).lower()}" for part in ("teacher", "train")]
    distill(teacher, read_settings(teacher, [*DISTILLED, *compiled]), setting.out / "distilled")
    student = load_model(setting.out / "distilled" / "model", setting.device)
    ways: dict[str, tuple[Model, dict[str, Any]]] = {"teacher, 24 steps, guidance 2": (teacher, TEACHER)}
    ways |= {f"student, {steps} step{'s' * (steps > 1)}": (student, {"steps": steps}) for steps in (8, 4, 2, 1)}
    seconds = best_times({name: partial(sampled, *way, TIMED) for name, way in ways.items()}, 3, setting.device)
    rows: list[Row] = []
    for name, (model, how) in ways.items():
        calls = 2 * how["steps"] if model is teacher else how["steps"]
        row = {"way": name, "network_calls": calls} | quality(model, how, against)
        rows.append(row | {"image_milliseconds": 1e3 * seconds[name] / TIMED, "ratio": _ratio(seconds, name)})
        print(rows[-1], flush=True)
    return rows


def _ratio(seconds: dict[str, float], name: str) -> float:
    return next(iter(seconds.values())) / seconds[name]


def inside(setting: Setting) -> list[Row]:
    """Guidance by the null class, by a second head, and by a less trained network (AutoGuidance), of one model.

    The model is trained on for some hundred steps, for the head; the less trained network for as many from the start.
    """
    given = [f"{part}.train=null" for part in TOKENIZERS]
    given += [f"{part}.folder={MODEL / part}" for part in TOKENIZERS]
    recipe = load_recipe(ROOT / "recipes" / "shapes.yaml", [*given, *HEAD])
    pipeline, against = Pipeline(recipe, setting.out / "inside", setting.device), reference(setting)
    pipeline.latents.make()
    pipeline.transformer.make()
    model, rows = pipeline.model, []
    guiding = replace(model, transformer=_early(pipeline, model, setting.out / "early"))
    for source, calls in CALLS.items():
        for scale in SCALES if source == "null_class" else SCALES[1:]:
            for steps in (24, 12):
                how = {"steps": steps, "guidance": scale, "guidance_from": source}
                row = {"guidance_from": source if scale != 1 else "none", "guidance": scale, "steps": steps}
                row["network_calls"] = steps * (calls if scale != 1 else 1)
                rows.append(row | quality(model, how, against, guiding if source == "guiding_model" else None))
                print(rows[-1], flush=True)
    return rows


def _early(pipeline: Pipeline, model: Model, folder: Path) -> LightningDiT:
    """A network like the model's, trained from the start for as long as the model was trained on."""
    recipe, latents = pipeline.recipe, LatentSet(pipeline.folder.latents)
    network, size = LightningDiT(model.transformer.config, seed=recipe.seed), recipe.train.batch_size
    task = DiffusionTask(network, latents, model.schedule, recipe.loss, seed=recipe.seed, batch_size=size)
    return cast(LightningDiT, fit(task, recipe.train, folder, device=pipeline.device))


def sampled(model: Model, how: dict[str, Any], count: int, guiding: Model | None = None) -> np.ndarray:
    """Images of all classes in turn, from seeds 0, 1, …"""
    labels = [k % len(model.classes) for k in range(count)]
    config = model.config(batch_size=AT_ONCE, **how)
    batches = model.sample_batches(labels, range(count), config, guiding=guiding)
    return np.concatenate([batch.images for batch in batches])


def quality(model: Model, how: dict[str, Any], against: Reference, guiding: Model | None = None) -> Row:
    """Fréchet distance with its interval, and class accuracy."""
    labels = [k % len(model.classes) for k in range(SAMPLES)]
    seen = evaluate(sampled(model, how, SAMPLES, guiding), labels, against, name=str(how))
    low, high = seen.intervals["frechet_distance"]
    found = {"frechet_distance": seen.frechet_distance, "interval": f"{low:.3g} to {high:.3g}"}
    return found | {"class_accuracy": seen.class_accuracy}
