"""After training: samples, their metrics against held-out images, and the report.

Without an evaluation classifier there are samples and a report that says how to evaluate them.
"""

from __future__ import annotations

import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfd.evaluation.evaluate import Metrics, evaluate, evaluate_real, read_metrics
from sfd.evaluation.reference import RealImages, Reference, reference_of
from sfd.evaluation.report import MAX_ROWS, Gallery, ReportContent, StageCost, write_report
from sfd.evaluation.samples import load_samples
from sfd.generation.config import SamplingConfig
from sfd.generation.folder import image_path, read_images, write_grid, write_samples
from sfd.generation.model import Model
from sfd.generation.trajectory import Trajectory, follow_sample, schedule_curves
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import Recipe, dump_recipe
from sfd.run.stages import RunFolder, Stage, pick
from sfd.training.log import read_line
from sfd.training.tasks.classifier import divide
from sfd.utils import distributed, files
from sfd.utils.config import parse

GUIDED, UNGUIDED = "guided", "unguided"
GRID_COLUMNS = 10


def assess(pipeline: Pipeline) -> None:
    """Sample with and without guidance, evaluate both and real images, and write the report."""
    variants = _variants(pipeline)
    for name, settings in variants.items():
        _sample(pipeline, name, settings)
    if pipeline.recipe.evaluation.classifier is not None:
        pipeline.carry_out(_metrics_stage(pipeline, list(variants)), lambda: _measure(pipeline, list(variants)))
    if distributed.is_main_process():
        write_run_report(pipeline, list(variants))


def stages(pipeline: Pipeline) -> list[Stage]:
    """List the stages that come after the model, without loading anything."""
    sample = pipeline.recipe.sample
    listed = [_samples_stage(pipeline, GUIDED, sample), _samples_stage(pipeline, UNGUIDED, sample.unguided())]
    if pipeline.recipe.evaluation.classifier is not None:
        listed.append(_metrics_stage(pipeline, []))
    return listed


def _metrics_stage(pipeline: Pipeline, names: list[str]) -> Stage:
    def inputs() -> dict[str, Any]:
        return _models(pipeline, weak=GUIDED in names) | {"evaluator": pipeline.evaluator.identity}

    folder, fields = pipeline.folder, pick(pipeline.fixed, "seed", "data", "sample", "evaluation")
    results = tuple(metrics_path(folder, row) for row in _rows(names))
    return Stage("metrics", "sfd report", folder.metrics, fields, inputs, results=results)


def _samples_stage(pipeline: Pipeline, name: str, settings: SamplingConfig, count: int = 0) -> Stage:
    folder = pipeline.folder.samples / name
    fields = pick(pipeline.fixed, "evaluation.samples_per_class", "evaluation.seed") | {"sample": settings.fixed()}
    results = tuple(image_path(folder, number, count) for number in range(count))
    inputs = partial(_models, pipeline, weak=name == GUIDED)
    return Stage(f"{name} samples", "sfd report", folder, fields, inputs, results=results)


def _models(pipeline: Pipeline, *, weak: bool) -> dict[str, Any]:
    """Identify what makes the samples."""
    weaker = pipeline.weak if weak else None
    return {"model": pipeline.model.identity, "weak model": weaker.identity if weaker else None}


def _variants(pipeline: Pipeline) -> dict[str, SamplingConfig]:
    """The sampling settings that are compared: the recipe's, and the same without guidance."""
    recipe, settings = pipeline.recipe, pipeline.sample_settings(pipeline.model)
    plain = settings.unguided()
    if settings == plain:
        return {UNGUIDED: plain}
    return {GUIDED: settings, **({UNGUIDED: plain} if recipe.evaluation.unguided else {})}


def _sample(pipeline: Pipeline, name: str, settings: SamplingConfig) -> None:
    evaluation, model = pipeline.recipe.evaluation, pipeline.model
    labels = [label for label in model.labels for _ in range(evaluation.samples_per_class)]
    seeds = list(range(evaluation.seed, evaluation.seed + len(labels)))
    folder = pipeline.folder.samples / name
    weak = pipeline.weak if name == GUIDED else None

    def work() -> None:
        write_samples(folder, model, labels, seeds, settings, guiding=weak)
        distributed.barrier()  # after a change of their number one may be hours behind the others
        per_class = evaluation.samples_per_class
        if distributed.is_main_process():
            write_grid(folder, _grid_numbers(per_class, _shown_classes(model)), min(GRID_COLUMNS, per_class))

    pipeline.carry_out(_samples_stage(pipeline, name, settings, len(seeds)), work, together=True)


def _shown_classes(model: Model) -> list[int]:
    """Numbers of the classes that grids show: all, or an even selection that fits a page."""
    classes = len(model.labels)
    rows = min(classes, MAX_ROWS)
    return [i * classes // rows for i in range(rows)]


def _grid_numbers(per_class: int, classes: list[int]) -> list[int]:
    """Numbers of the first images of each of these classes, one row per class."""
    if len(classes) == 1:
        return list(range(min(per_class, GRID_COLUMNS**2)))
    return [c * per_class + i for c in classes for i in range(min(GRID_COLUMNS, per_class))]


def held_out_images(pipeline: Pipeline) -> RealImages:
    """Real images that neither the model nor the evaluation classifier was trained on."""
    _, images = divide(pipeline.images[1], pipeline.classifier_settings)
    return RealImages("held-out real images", images.identity, images)


def reference(pipeline: Pipeline) -> Reference:
    """The reference of the run's metrics: features of held-out images by the evaluation classifier."""
    real = held_out_images(pipeline)
    assert real.images is not None
    return reference_of(real.images, pipeline.evaluator, real.name)


def _measure(pipeline: Pipeline, names: list[str]) -> None:
    against = reference(pipeline)
    rows = []
    for name in names:
        samples = load_samples(pipeline.folder.samples / name)
        labels = samples.labels_among(pipeline.evaluator.classes)
        rows.append(evaluate(samples.images, labels, against, name=f"{name} samples", sampling=samples.sampling))
    rows.append(evaluate_real(pipeline.images[0], against, rows[0].n_samples, pipeline.recipe.seed))
    for row in rows:
        row.write(metrics_path(pipeline.folder, row.name))


def metrics_path(folder: RunFolder, row: str) -> Path:
    """Path of one row of the metrics."""
    return folder.metrics / f"{row.replace(' ', '-')}.json"


def _rows(names: list[str]) -> list[str]:
    """Name the rows: the variants, then real images."""
    return [*(f"{name} samples" for name in names), "real training images"]


def read_run_metrics(folder: RunFolder, names: list[str]) -> list[Metrics]:
    """Read what a run measured: the named variants, then real images."""
    return [read_metrics(metrics_path(folder, row)) for row in _rows(names)]


def write_run_report(pipeline: Pipeline, names: list[str]) -> None:
    """Write report.html from the files of a finished run."""
    recipe, folder, model = pipeline.recipe, pipeline.folder, pipeline.model
    evaluated = recipe.evaluation.classifier is not None
    metrics = read_run_metrics(folder, names) if evaluated else []
    costs = [
        StageCost(r["stage"], r["seconds"], r["peak_memory_bytes"], r["peak_device_memory_bytes"])
        for r in folder.finished()
    ]
    content = ReportContent(
        title=recipe.name,
        summary=_summary(recipe, model, metrics),
        facts=_facts(pipeline),
        recipe=dump_recipe(recipe),
        galleries=[_gallery(pipeline, name) for name in names],
        schedule=schedule_curves(model),
        strip=_strip(pipeline),
        logs=_logs(folder),
        metrics=metrics,
        stages=costs,
    )
    write_report(folder.report, content)


def _strip(pipeline: Pipeline) -> Trajectory | None:
    """Follow the first sample of the class in the middle; a single stream has no phases to show."""
    model, labels = pipeline.model, pipeline.model.labels
    if len(model.composite.streams) < 2:
        return None
    seed, settings = pipeline.recipe.evaluation.seed, pipeline.sample_settings(model)
    return follow_sample(model, settings, seed, labels[len(labels) // 2], pipeline.weak)


def _summary(recipe: Recipe, model: Model, metrics: list[Metrics]) -> str:
    accuracy = metrics[0].class_accuracy if metrics and "class_accuracy" not in metrics[0].caveats else None
    evaluated = "" if accuracy is None else f" An independent classifier recognises {accuracy:.1%} of its samples."
    if not metrics:
        evaluated = " This run has no evaluation classifier: use sfd evaluate SAMPLES --reference …"
    parameters = f"{model.history['parameters']:,}"
    return (
        f"A semantic-first diffusion model of {parameters} parameters, trained from nothing on {data_name(recipe)}."
        + evaluated
    )


def data_name(recipe: Recipe) -> str:
    """Describe the training data."""
    published = recipe.latents.published
    return str(recipe.data.source) if published is None else f"the published latents in {published}"


def _facts(pipeline: Pipeline) -> dict[str, str]:
    recipe, model = pipeline.recipe, pipeline.model
    streams = "; ".join(f"{s.name} {s.channels}×{s.grid}×{s.grid}" for s in model.composite.streams)
    held_out = "" if recipe.data.source is None else f", {len(pipeline.images[1]):,} held out"
    return {
        "Data": f"{data_name(recipe)}, {len(pipeline.latents):,} training images{held_out}",
        "Latent": streams,
        "Schedule": ", ".join(f"{k} {v}" for k, v in model.schedule.spec.items()),
        "Training": f"{recipe.train.steps:,} steps of {recipe.train.batch_size}, {recipe.train.precision}",
        "Sampling": pipeline.sample_settings(model).summary(),
        "Machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {pipeline.device}",
        "Software": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }


def _gallery(pipeline: Pipeline, name: str) -> Gallery:
    model, per_class = pipeline.model, pipeline.recipe.evaluation.samples_per_class
    shown = _shown_classes(model)
    numbers = _grid_numbers(per_class, shown)
    record = files.read_json(pipeline.folder.samples / name / "samples.json", "folder of samples")
    labels = np.array([record["labels"][i] for i in numbers]) if model.classes else None
    caption = parse(SamplingConfig, record["sampling"], "samples.json").summary()
    if model.classes and len(shown) < len(model.classes):
        caption += f"; {len(shown)} of {len(model.classes)} classes"
    return Gallery(
        name.capitalize(), caption, read_images(pipeline.folder.samples / name, numbers), labels, model.classes
    )


def _logs(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    parts = {
        "transformer": folder.training,
        "SemVAE": folder.compressor,
        "texture encoder": folder.texture,
        "semantic encoder": folder.semantic,
        "evaluation classifier": folder.evaluator,
    }
    logs = {name: path / "log.jsonl" for name, path in parts.items()}
    return {
        name: [read_line(line, path) for line in path.read_bytes().splitlines()]
        for name, path in logs.items()
        if path.exists()
    }
