"""The report of a run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from sfd import __version__
from sfd.data.grid import image_grid
from sfd.evaluation import figures
from sfd.evaluation.evaluate import Metrics
from sfd.generation.trajectory import ScheduleCurves, Trajectory
from sfd.utils import files
from sfd.utils.errors import SFDError
from sfd.utils.units import duration, memory

MAX_ROWS = 24  # classes shown of a gallery
MAX_COLUMNS = 10  # images shown of a class
MAX_SIDE = 128  # pixels of an image in the report; larger ones are scaled down
# Log entries that get no curve; those with a slash are parts of others.
UNDRAWN = {"step", "learning_rate", "gradient_norm", "skipped", "rollbacks", "ema_distance"}
UNDRAWN |= {"images_per_second", "checkpoint_pause", "waiting"}
ABBREVIATIONS = {"mse": "MSE", "kl": "KL", "repa": "REPA"}


@dataclass(frozen=True)
class Gallery:
    """Samples shown by class, one class a row."""

    title: str  # "Guided"
    caption: str  # how they were made
    images: np.ndarray  # uint8 (N, H, W, 3)
    labels: np.ndarray | None  # (N,), into classes; None: images have no class
    classes: Sequence[str]


@dataclass(frozen=True)
class StageCost:
    """What a part of the run took."""

    stage: str
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int = 0  # of an accelerator; 0: none was used


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report shows, as plain data. What is empty or None is left out."""

    title: str
    summary: str  # a sentence or two: what was run, on what
    facts: Mapping[str, str]  # data set, parameter counts, machine …
    recipe: str  # the resolved recipe, YAML
    galleries: Sequence[Gallery] = ()
    schedule: ScheduleCurves | None = None
    strip: Trajectory | None = None
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # part's name to lines of its log
    metrics: Sequence[Metrics] = ()  # the row that matters most first; real images, if any, last
    stages: Sequence[StageCost] = ()


def write_report(path: Path, content: ReportContent) -> None:
    """Write the report, whole or not at all.

    Raises:
        SFDError: a strip without the schedule that it follows, or pictures of the wrong shape.
    """
    if content.strip is not None and content.schedule is None:
        raise SFDError("a report with a strip needs the schedule too; give both or neither")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sfd.evaluation", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "memory": memory, "percent": percent, "number": number}
    page = environment.get_template("report.html").render(
        content=content,
        version=__version__,
        colours=figures.COLOURS,
        galleries=[_gallery(g) for g in content.galleries],
        strip=_strip(content.strip, content.schedule) if content.strip and content.schedule else None,
        schedule=Markup(_schedule(content.schedule)) if content.schedule else None,
        curves=[_curves(name, lines) for name, lines in content.logs.items() if lines],
        classes=list(dict.fromkeys(name for row in content.metrics for name in row.accuracy_by_class)),
        protocols=list(dict.fromkeys(_protocol(row) for row in content.metrics)),
        total_seconds=sum(stage.seconds for stage in content.stages),
        device_memory=max((stage.peak_device_memory_bytes for stage in content.stages), default=0),
    )
    files.write_text(path, page)


def percent(share: float | None) -> str:
    """Say a share in percent; a dash if there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int) -> str:
    """Write a number with so many digits after the point; a dash if there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _protocol(row: Metrics) -> str:
    """Say what a row's numbers hang on, in a paragraph."""
    p = row.protocol
    accuracy = "" if p.extractor_accuracy is None else f", {percent(p.extractor_accuracy)} right on images it never saw"
    moments = ", by moments stored with it" if p.stored_moments else ""
    features = (
        "The features are not those of Inception: compare these numbers with each other, not with published FIDs."
        if p.extractor == "classifier"
        else "; ".join(f"Not comparable with published numbers: {caveat}" for caveat in row.caveats)
    )
    return (
        f"Compared with {p.reference_count:,} {p.reference} ({p.reference_identity}){moments}. Features from the "
        f"extractor “{p.extractor}” ({p.extractor_identity}; trained to tell {p.extractor_task}{accuracy}). Fréchet "
        f"distance of Gaussians in float64; precision and recall with k = {p.neighbours} neighbours. {features}"
    )


def _gallery(gallery: Gallery) -> dict[str, Any]:
    """Cut a gallery into rows, one picture a class."""
    images = np.stack([_thumbnail(image) for image in gallery.images]) if len(gallery.images) else gallery.images
    if gallery.labels is None or not gallery.classes:
        rows = [("", images[start : start + MAX_COLUMNS]) for start in range(0, len(images), MAX_COLUMNS)]
    else:
        labels = np.asarray(gallery.labels)
        present = [index for index in range(len(gallery.classes)) if (labels == index).any()]
        rows = [(gallery.classes[index], images[labels == index][:MAX_COLUMNS]) for index in present]
    shown = [
        {"name": name, "columns": len(row), "picture": figures.data_uri(image_grid(row, len(row)))}
        for name, row in rows[:MAX_ROWS]
    ]
    left_out = f"The first {MAX_ROWS} of {len(rows)} rows." if len(rows) > MAX_ROWS else ""
    columns = max((len(row) for _, row in rows[:MAX_ROWS]), default=1)
    return {"gallery": gallery, "rows": shown, "left_out": left_out, "columns": columns}


def _thumbnail(image: np.ndarray) -> np.ndarray:
    if image.shape[0] <= MAX_SIDE:
        return image
    return np.asarray(Image.fromarray(image).resize((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS))


def _schedule(curves: ScheduleCurves) -> str:
    return figures.schedule_drawing(curves.base, curves.times, curves.rates, curves.names, curves.knots)


def _strip(strip: Trajectory, schedule: ScheduleCurves) -> dict[str, Any]:
    """Lay out the strip: a column a frame, phases and knots placed on the axis that the columns' base times make."""
    count = len(strip.base)
    colours = figures.semantic_colours(strip.semantic)
    frames = [
        {
            "semantic": figures.data_uri(colours[i]),
            "decoded": figures.data_uri(_thumbnail(strip.decoded[i])),
            "base": float(strip.base[i]),
            "times": [float(t) for t in strip.times[i]],
        }
        for i in range(count)
    ]

    def place(u: float) -> float:
        """Where a base time lies across the strip, in percent; frames stand in the middle of their columns."""
        return float(np.interp(u, strip.base, (np.arange(count) + 0.5) / count)) * 100

    edges = [0.0, *schedule.knots, 1.0]
    phases = []
    for start, end in itertools.pairwise(edges):
        middle = int(np.abs(schedule.base - (start + end) / 2).argmin())
        moving = [name for name, rate in zip(schedule.names, schedule.rates[middle], strict=True) if rate > 0]
        left = 0.0 if start == 0 else place(start)
        right = 100.0 if end == 1 else place(end)
        phases.append({"text": _phase(moving, len(schedule.names)), "left": left, "width": right - left})
    knots = [{"at": float(u), "left": place(u)} for u in schedule.knots]
    return {"strip": strip, "frames": frames, "phases": phases, "knots": knots, "names": list(schedule.names)}


def _phase(moving: Sequence[str], streams: int) -> str:
    if not moving:  # an offset beyond 1: the leaders have arrived, the others have not set out
        return "at rest"
    if len(moving) == streams:
        return "both" if streams == 2 else "all"
    return " and ".join(moving) + " alone"


def _curves(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw every logged quantity of one part that is worth a curve."""
    quantities = [
        key for key in dict.fromkeys(k for line in lines for k in line) if key not in UNDRAWN and "/" not in key
    ]
    drawings = []
    for quantity in quantities:
        points = [(line["step"], line[quantity]) for line in lines if np.isfinite(line.get(quantity, np.nan))]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            drawings.append(
                Markup(figures.curve(steps, values, ABBREVIATIONS.get(quantity, quantity.replace("_", " "))))
            )
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    speed = f", {np.median(speeds):,.0f} images a second" if speeds else ""
    return {"name": name, "note": f"{lines[-1]['step']:,} steps{speed}", "drawings": drawings}
