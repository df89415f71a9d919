"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from sfd import __version__
from sfd.evaluation import figures
from sfd.evaluation.evaluate import Metrics
from sfd.generation.config import SamplingConfig
from sfd.generation.curves import ScheduleCurves
from sfd.utils import files
from sfd.utils.units import duration, memory

MAX_SIDE = 256  # pixels of an image in the report; larger ones are scaled down
MAX_PIXELS = 5_000_000  # of a gallery; of more, the last rows are left out
MAX_SKIPPED = 100  # files that are named
# Log entries that get no curve; those with a slash are parts of others.
UNDRAWN = {"step", "learning_rate", "gradient_norm", "skipped"}
UNDRAWN |= {"images_per_second", "checkpoint_pause", "waiting"}
ABBREVIATIONS = {"mse": "MSE", "kl": "KL", "repa": "REPA", "psnr": "PSNR"}
COLUMNS = {
    "class_accuracy": "Class accuracy",
    "frechet_distance": "Fréchet distance",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}
IN_PERCENT = ("class_accuracy", "precision", "recall")
IN_CARDS = ("class_accuracy", "frechet_distance", "precision", "recall")
UNSEEN = ("batch_size", "compile")  # settings that change no image


@dataclass(frozen=True)
class Gallery:
    """Images in rows, each of which can be enlarged."""

    title: str  # "Guided samples"
    caption: str  # how they were made
    rows: Sequence[tuple[str, np.ndarray]]  # name (of the class), or "", and images: uint8 (N, S, S, 3)
    framed: bool = False  # the first image of each row is another kind than the rest
    folded: bool = False  # shown on request


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report shows, as plain data. What is empty or None is left out."""

    title: str
    summary: str  # a sentence or two: what was run, on what
    facts: Mapping[str, str]  # data set, parameter counts, machine …
    recipe: str  # the resolved recipe, YAML
    galleries: Sequence[Gallery] = ()
    schedule: ScheduleCurves | None = None
    player: str | None = None  # page of the explorer with some of the samples
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # part's name to lines of its log
    previews: Sequence[tuple[str, Image.Image]] = ()  # "step 500" and a grid of samples, in order
    metrics: Sequence[Metrics] = ()  # the row that matters most first; real images, if any, last
    stages: Sequence[Mapping[str, Any]] = ()  # records of the stages, with their time and memory
    skipped: Sequence[tuple[str, str]] = ()  # file that could not be used, and why
    next_steps: Sequence[tuple[str, str]] = ()  # what to do next, and the command


def write_report(path: Path, content: ReportContent) -> None:
    """Write the report atomically."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sfd.evaluation", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "memory": memory}
    page = environment.get_template("report.html").render(
        content=content,
        version=__version__,
        columns={k: label for k, label in COLUMNS.items() if any(getattr(m, k) is not None for m in content.metrics)},
        cards=[key for key in IN_CARDS if content.metrics and getattr(content.metrics[0], key) is not None],
        value=_value,
        settings=_settings,
        galleries=[_gallery(gallery) for gallery in content.galleries],
        schedule=figures.schedule(content.schedule) if content.schedule else None,
        previews=[(name, figures.picture(grid, grid.height)) for name, grid in content.previews],
        curves=[_curves(name, lines) for name, lines in content.logs.items() if lines],
        doubts=list(dict.fromkeys(text for row in content.metrics for why in row.caveats.values() for text in why)),
        protocols=list(dict.fromkeys(_protocol(row) for row in content.metrics)),
        skipped=content.skipped[:MAX_SKIPPED],
        total_seconds=sum(stage["seconds"] for stage in content.stages),
        device_memory=max((stage["peak_device_memory_bytes"] for stage in content.stages), default=0),
    )
    files.write_text(path, page)


def _value(row: Metrics, metric: str) -> tuple[str, str]:
    """Format a metric and its 95 % interval; a dash and nothing if there is none."""
    value = getattr(row, metric)
    if value is None:
        return "–", ""
    scale, digits, unit = (100, 1, " %") if metric in IN_PERCENT else (1, 2, "")
    shown, *interval = (f"{scale * x:.{digits}f}" for x in (value, *row.intervals.get(metric, ())))
    return shown + unit, " to ".join(interval) + (unit if interval else "")


def _settings(sampling: Mapping[str, Any]) -> str:
    """Describe how samples were made; settings that are as they always are need no word."""
    usual = SamplingConfig().model_dump(mode="json", exclude={"solver", "steps", "guidance"})
    shown = {key: v for key, v in sampling.items() if key not in UNSEEN and v not in (None, {}, "", usual.get(key))}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _protocol(row: Metrics) -> str:
    """Describe a row's evaluation protocol in a paragraph."""
    p = row.protocol
    accuracy = (
        "" if p.extractor_accuracy is None else f", {100 * p.extractor_accuracy:.1f} % right on images it never saw"
    )
    moments = ", by moments stored with it" if p.stored_moments else ""
    features = (
        "The features are not those of Inception: compare these numbers with each other, not with published FIDs."
        if p.extractor == "classifier"
        else "; ".join(f"Not comparable with published numbers: {reason}" for reason in row.not_comparable)
    )
    return (
        f"Compared with {p.reference_count:,} {p.reference} ({p.reference_identity}){moments}. Features from the "
        f"extractor “{p.extractor}” ({p.extractor_identity}; trained to tell {p.extractor_task}{accuracy}). Fréchet "
        f"distance of Gaussians in float64; precision and recall with k = {p.neighbours} neighbours. Intervals: 95 %, "
        f"bootstrap. {features}"
    )


def _gallery(gallery: Gallery) -> dict[str, Any]:
    """Encode a gallery's images, each as a picture of its own."""
    rows: list[tuple[str, list[str]]] = []
    pixels = 0
    for name, images in gallery.rows:
        shown = figures.scaled(images, MAX_SIDE)
        pixels += shown.size // 3
        if rows and pixels > MAX_PIXELS:
            break
        rows.append((name, [figures.picture(Image.fromarray(image), len(image)) for image in shown]))
    side = min((images.shape[1] for _, images in gallery.rows), default=0)
    columns = max((len(pictures) for _, pictures in rows), default=1)
    coarse = side <= figures.MAX_PNG_SIDE  # shown larger than they are
    return {"gallery": gallery, "rows": rows, "columns": columns, "coarse": coarse, "named": any(n for n, _ in rows)}


def _curves(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw every logged quantity of one stage that is worth a curve."""
    logged = dict.fromkeys(key for line in lines for key in line)
    drawings = []
    for quantity in (key for key in logged if key not in UNDRAWN and "/" not in key):
        points = [(line["step"], line[quantity]) for line in lines if np.isfinite(line.get(quantity, np.nan))]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            label = ABBREVIATIONS.get(quantity, quantity.replace("_", " "))
            drawings.append((f"{label} over training steps", figures.curve(steps, values, label)))
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    speed = f", {np.median(speeds):,.0f} images per second" if speeds else ""
    return {"name": name, "note": f"{lines[-1]['step']:,} steps{speed}", "drawings": drawings}
