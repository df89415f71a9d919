"""The report of a finished run, from its files."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfd.evaluation.evaluate import Metrics
from sfd.evaluation.report import Gallery, ReportContent, write_report
from sfd.explorer import image_side, static_page
from sfd.generation.curves import schedule_curves
from sfd.generation.folder import grid_rows, read_images
from sfd.generation.model import Model
from sfd.run.assessment import EvaluatorStage, SamplesStage
from sfd.run.encoders import EncoderStage
from sfd.run.images import RunImages
from sfd.run.recipe import Recipe, dump_recipe
from sfd.run.report_images import nearest, previews, reconstructions
from sfd.run.stages import Run, RunFolder
from sfd.training.log import read_line

# Of the player: samples, frames of each, pixels on a side, and of all its pictures, which take 1 to 2 bytes each.
MAX_PLAYED, FRAMES, PLAYER_SIDE, PLAYER_PIXELS = 10, 25, 128, 800_000


def write_run_report(
    run: Run,
    samples: Sequence[SamplesStage],
    metrics: Sequence[Metrics],
    images: RunImages,
    latents: int,
    evaluator: EvaluatorStage,
    semantic: EncoderStage,
) -> None:
    """Write report.html.

    Args:
        run: recipe, folder and device.
        samples: what was sampled; the first kind is the one that matters most.
        metrics: what was measured of them, then of real images; empty without an evaluation classifier.
        images: the run's images.
        latents: number of training images.
        evaluator: by whose features training images are compared with samples, if the run has one.
        semantic: by whose features otherwise.
    """
    model = samples[0].model
    galleries = [_gallery(stage, folded=stage is not samples[0]) for stage in samples]
    if run.recipe.data.source is not None:
        galleries.append(reconstructions(images, model.texture, run.device))
        near = nearest(samples[0], images, evaluator, semantic)
        galleries += [near] if near is not None else []
    content = ReportContent(
        title=run.recipe.name,
        summary=_summary(run.recipe, model, metrics),
        facts=_facts(run, model, samples[0], images, latents),
        recipe=dump_recipe(run.recipe),
        galleries=galleries,
        schedule=schedule_curves(model),
        player=_player(samples[0]),
        logs=_logs(run.folder),
        previews=previews(run.folder.training),
        metrics=metrics,
        stages=run.folder.finished(),
        skipped=_skipped(run.folder),
        next_steps=_next_steps(run, model),
    )
    write_report(run.folder.report, content)


def _player(samples: SamplesStage) -> str | None:
    """The explorer's page with the first sample of some classes; a single stream has no phases to show."""
    model, first = samples.model, [numbers[0] for _, numbers in grid_rows(samples.labels)]
    if len(model.composite.streams) < 2:
        return None
    side, seed = min(image_side(model), PLAYER_SIDE), samples.run.recipe.evaluation.seed
    count = min(len(first), MAX_PLAYED, max(1, PLAYER_PIXELS // (2 * FRAMES * side**2)))
    numbers = [first[i * len(first) // count] for i in range(count)]
    return static_page(
        model,
        [(samples.labels[number], seed + number) for number in numbers],
        samples.run.recipe.name,
        guiding=samples.guiding(),
        side=side,
        pixels=PLAYER_PIXELS,
        **samples.settings.model_dump(mode="json"),
    )


def _summary(recipe: Recipe, model: Model, metrics: Sequence[Metrics]) -> str:
    evaluated = ""
    if not metrics:
        evaluated = " This run has no evaluation classifier: use sfd evaluate SAMPLES --reference …"
    elif metrics[0].class_accuracy is not None and "class_accuracy" not in metrics[0].caveats:
        evaluated = f" An independent classifier recognises {metrics[0].class_accuracy:.1%} of its samples."
    kind = "semantic-first diffusion model" if len(model.composite.streams) > 1 else "diffusion model of texture alone"
    start = "trained" if recipe.train.init is None else f"started from {recipe.train.init} and trained"
    parameters = f"{model.history['parameters']:,} parameters"
    return f"A {kind} with {parameters}, {start} on {_data_name(recipe)}.{evaluated}"


def _words(values: Mapping[str, Any]) -> str:
    """Write settings as a reader would: offset, delta 0.3, leaders semantic."""
    listed = {key: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for key, v in values.items()}
    return ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in listed.items())


def _data_name(recipe: Recipe) -> str:
    published = recipe.latents.published
    return str(recipe.data.source) if published is None else f"the published latents in {published}"


def _facts(run: Run, model: Model, samples: SamplesStage, images: RunImages, latents: int) -> dict[str, str]:
    recipe = run.recipe
    held_out = "" if recipe.data.source is None else f", {len(images.held_out):,} held out"
    return {
        "Data": f"{_data_name(recipe)}, {latents:,} training images{held_out}",
        "Latent": "; ".join(f"{s.name} {s.channels}×{s.grid}×{s.grid}" for s in model.composite.streams),
        "Schedule": _words(model.schedule.spec),
        "Training": f"{recipe.train.steps:,} steps of {recipe.train.batch_size}, {recipe.train.precision}",
        "Sampling": samples.settings.summary(),
        "Machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {run.device}",
        "Software": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }


def _gallery(samples: SamplesStage, folded: bool) -> Gallery:
    classes, rows = samples.model.classes, grid_rows(samples.labels)
    caption, shown = samples.settings.summary(), len({label for label, _ in rows})
    if shown < len(classes):
        caption += f"; {shown} of {len(classes)} classes"
    named = [((*classes, "")[label], read_images(samples.folder, numbers)) for label, numbers in rows]
    return Gallery(f"{samples.variant.capitalize()} samples", caption, named, folded=folded)


def _skipped(folder: RunFolder) -> list[tuple[str, str]]:
    """Names and reasons of files that could not be used."""
    if not folder.skipped.exists():
        return []
    lines = folder.skipped.read_text(encoding="utf-8").splitlines()
    return [(name, reason) for name, _, reason in (line.partition("\t") for line in lines)]


def _next_steps(run: Run, model: Model) -> list[tuple[str, str]]:
    """What can be done with this run, and the commands, as started from the same directory."""
    root = run.folder.root
    folder, samples, longer, tuned = (shlex.quote(f"{root}{end}") for end in ("", "-samples", "-longer", "-tuned"))
    chosen = f" --classes {shlex.quote(','.join(model.classes[:2]))}" if model.classes else ""
    recipe = shlex.quote(str(run.folder.recipe))
    steps = [
        ("Sample more images", f"sfd sample {folder}{chosen} --seeds 0-15 --out {samples}"),
        ("See how an image arises, and edit it", f"sfd explore {folder}"),
        (
            f"Train for {run.recipe.train.steps:,} more steps, from these weights",
            f"sfd run {recipe} --out {longer} train.init={folder}",
        ),
        ("Fine-tune on other images", f"sfd run fine-tune --out {tuned} data.source=FOLDER train.init={folder}"),
    ]
    return steps if model.semantic is not None or len(model.composite.streams) < 2 else steps[:2]


def _logs(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    parts = {
        "transformer": folder.training,
        "SemVAE": folder.compressor,
        "texture encoder": folder.texture,
        "semantic encoder": folder.semantic,
        "evaluation classifier": folder.evaluator,
    }
    paths = {name: part / "log.jsonl" for name, part in parts.items()}
    return {
        name: [read_line(line, path) for line in path.read_bytes().splitlines()]
        for name, path in paths.items()
        if path.exists()
    }
