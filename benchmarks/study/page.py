"""The study's page: what holds and what does not, tables, plots, and all numbers as JSON."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import table
from benchmarks.study.work import FEW, REAL, SHOWN, WEAK
from sfd.evaluation.evaluate import Metrics, read_metrics
from sfd.utils import files

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 97.5 % quantiles of t, by degrees of freedom
DRAWN = ("texture", "repa", "offset-0", "offset-0.3", "offset-1", "arrived")  # arms whose fronts are plotted
CONVERGED = {"frechet_distance": "distance", "class_accuracy": "accuracy"}
GUIDED = {"guidance": "best guided distance", "weak": "best autoguided distance"}
COMPARED = {
    "unguided distance": ("frechet_distance", "guidance-1"),
    "unguided accuracy": ("class_accuracy", "guidance-1"),
}
COMPARED |= {f"unguided {name}": (name, "guidance-1") for name in ("precision", "recall")}
COMPARED |= {f"autoguided {name} at {WEAK[0]:g}": (metric, f"weak-{WEAK[0]:g}") for metric, name in CONVERGED.items()}
COMPARED |= {f"distance in {few} steps": ("frechet_distance", f"in-{few}-steps") for few in FEW}
CLAIMS = (
    ("repa", "texture", "REPA is better than texture alone"),
    ("offset-0", "repa", "a semantic stream, synchronous, is better than REPA alone"),
    ("offset-0.3", "offset-0", "semantics that lead by 0.3 are better than synchronous ones"),
    ("offset-0.3", "offset-1", "semantics that lead by 0.3 are better than sequential ones"),
    ("offset-0.3", "stationary", "not training streams at rest is better than training them"),
    ("arrived", "offset-0.3", "noise on finished semantics is better than none"),
    ("arrived-1", "offset-1", "noise on finished semantics is better than none, at an offset of 1"),
    ("channels-4", "offset-0.3", "semantics of 4 channels are better than of more"),
    ("data-0.3", "offset-0.3", "predicting the data is better than predicting the velocity"),
    ("data-0.3", "data-0", "with predictions of the data, 0.3 is better than synchronous"),
    ("density-0.3", "density-0", "with equal densities of each stream's time, 0.3 is better than synchronous"),
    ("density-0.3", "density-1", "with equal densities of each stream's time, 0.3 is better than sequential"),
    ("learned", "density-0.3", "a learned schedule is better than the offset 0.3, at equal densities"),
    ("learned", "offset-0.3", "a learned schedule is better than the offset 0.3 as it is"),
    ("compressor", "offset-0.3", "a SemVAE is better than principal components"),
    ("offset-0.3", "embedded", "the base's encoder is better than the embedded one"),
)


class Value(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval."""

    mean: float
    half: float


class Results:
    """The metrics of a data set: `found[arm][what][seed]`."""

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, dict[str, dict[int, Metrics]]] = defaultdict(lambda: defaultdict(dict))
        for path in sorted((folder / "results").glob("*.json")):
            name = re.fullmatch(r"(.+)\.seed-(\d+)\.(.+)\.json", path.name)
            if name is not None:
                self.found[name[1]][name[3]][int(name[2])] = read_metrics(path)

    def seeds(self, arm: str, what: str = "guidance-1") -> set[int]:
        """Seeds of an arm that were measured."""
        return set(self.found.get(arm, {}).get(what, {}))

    def value(
        self, arm: str, metric: str, what: str = "guidance-1", seeds: Collection[int] | None = None
    ) -> Value | None:
        """Average a metric over (some) seeds; its interval covers the draw of samples and the spread of seeds."""
        kept = [m for seed, m in self.found.get(arm, {}).get(what, {}).items() if seeds is None or seed in seeds]
        if not kept:
            return None
        sampled = float(np.mean([np.subtract(*seen.intervals[metric][::-1]) / 2 for seen in kept]))
        half = max(sampled, self._spread(metric, what)) / len(kept) ** 0.5
        return Value(float(np.mean([getattr(seen, metric) for seen in kept])), half)

    def _spread(self, metric: str, what: str) -> float:
        """Half the 95 % interval of one seed, from what effects of arms and of seeds leave unexplained."""
        cells = [(arm, *cell) for arm, kinds in self.found.items() for cell in kinds.get(what, {}).items()]
        arms, seeds = (np.array([cell[part] for cell in cells])[:, None] for part in (0, 1))
        values = np.array([getattr(seen, metric) for _, _, seen in cells])
        design = 1.0 * np.hstack([arms == np.unique(arms), seeds == np.unique(seeds)])
        effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
        freedom = len(values) - int(rank)
        left = float(np.square(values - design @ effects).sum())
        return STUDENT[min(freedom, len(STUDENT)) - 1] * (left / freedom) ** 0.5 if freedom else 0.0

    def front(
        self, arm: str, metric: str, seeds: Collection[int] | None = None, by: str = "guidance"
    ) -> list[tuple[float, Value]]:
        """A metric by scale of guidance by the null class, or by a "weak" model; a scale of 1 is none."""
        kinds = {float(what.split("-")[1]): what for what in self.found.get(arm, {}) if what.startswith(f"{by}-")}
        kinds |= {1.0: "guidance-1"} if kinds else {}
        pairs = [(scale, self.value(arm, metric, what, seeds)) for scale, what in sorted(kinds.items())]
        return [(scale, value) for scale, value in pairs if value is not None]

    def means(self) -> dict[str, Any]:
        """All metrics of all samples: arm → kind of sampling → metric → mean with its interval."""
        return {
            arm: {what: {metric: shown(self.value(arm, metric, what)) for metric in SHOWN} for what in sorted(kinds)}
            for arm, kinds in self.found.items()
        }

    def curve(self, arm: str, metric: str, images: int, steps: int) -> list[tuple[int, float]]:
        """Unguided distance, or share of images not recognised, by images seen; the last is of the trained model."""
        taken = sorted(int(what.split("-")[1]) for what in self.found.get(arm, {}) if what.startswith("step"))
        points = [(step * images, self.value(arm, metric, f"step-{step}")) for step in taken]
        points.append((steps * images, self.value(arm, metric)))
        found = [(seen, value.mean) for seen, value in points if value is not None]
        return [(seen, 1 - mean) for seen, mean in found] if metric == "class_accuracy" else found

    def best(
        self, arm: str, seeds: Collection[int] | None = None, by: str = "guidance"
    ) -> tuple[float | None, Value | None]:
        """The scale of guidance with the lowest distance, and the distance."""
        front = self.front(arm, "frechet_distance", seeds, by)
        return min(front, key=lambda pair: pair[1].mean, default=(None, None))


def bounds(folder: Path) -> str:
    """Say what real images get, as they are and decoded from their latents."""
    said = []
    for name in REAL:
        found = read_metrics(folder / "results" / f"{name}.json")
        low, high = found.intervals["frechet_distance"]
        distance = Value(cast(float, found.frechet_distance), (high - low) / 2)
        said.append(f"{name.replace('-', ' ')}: distance {shown(distance)}, accuracy {found.class_accuracy:.3f}")
    return f"No arm can do better than {'; '.join(said)}."


def verdict(better: Value | None, worse: Value | None, lower: bool) -> str:
    """Say whether an ordering holds, with intervals that do not overlap."""
    if better is None or worse is None:
        return "not measured"
    gain = (worse.mean - better.mean) * (1 if lower else -1)
    if abs(gain) <= better.half + worse.half:
        return "not separated"
    return "holds" if gain > 0 else "the reverse holds"


def claims(results: Results) -> list[dict[str, Any]]:
    """Check each claim, on the seeds that both arms have, in distance and in accuracy."""
    rows = []
    for better, worse, claim in CLAIMS:
        arms, seeds = (better, worse), results.seeds(better) & results.seeds(worse)
        pairs = {
            name: [results.value(arm, metric, what, seeds) for arm in arms] for name, (metric, what) in COMPARED.items()
        }
        for by, name in GUIDED.items():
            seeds_guided = results.seeds(better, f"{by}-{WEAK[0]:g}") & results.seeds(worse, f"{by}-{WEAK[0]:g}")
            pairs[name] = [results.best(arm, seeds_guided, by)[1] for arm in arms]
        row: dict[str, Any] = {"claim": claim, "seeds": len(seeds)}
        for what, (one, other) in pairs.items():
            row[what] = f"{verdict(one, other, 'distance' in what)}: {shown(one)}, {shown(other)}"
        if any(None not in pair for pair in pairs.values()):
            rows.append(row)
    return rows


def summary(checked: list[dict[str, Any]]) -> str:
    """Say what holds and what does not, and in which metrics: a list with one item per verdict."""
    items = []
    for found in ("holds", "the reverse holds", "not separated"):
        by_claim = {
            row["claim"]: [n for n, text in row.items() if str(text).startswith(f"{found}:")] for row in checked
        }
        said = [f"{claim} ({', '.join(metrics)})" for claim, metrics in by_claim.items() if metrics]
        if said:
            items.append(f"- **{found[0].upper()}{found[1:]}**: {'; '.join(said)}.")
    return "\n".join(items) if items else "Nothing to compare yet."


def shown(value: Value | None) -> str:
    """A value with its interval; shares of 1 as they are."""
    if value is None:
        return "—"
    digits = 3 if value.mean < 1 else 2
    return f"{value.mean:.{digits}f} ± {value.half:.{digits}f}"


def reached(curve: list[tuple[int, float]], distance: float) -> float | None:
    """Images until a distance (or error) was first reached, by straight lines on logarithms of both; None: never."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= distance < high:
            share = math.log(high / distance) / math.log(high / low)
            return math.exp((1 - share) * math.log(before) + share * math.log(after))
    return float(curve[0][0]) if curve and curve[0][1] <= distance else None


def rows(results: Results, images: int, steps: int) -> list[dict[str, Any]]:
    """One row per arm."""
    listed = []
    for arm in filter(results.seeds, results.found):
        row: dict[str, Any] = {"arm": arm, "seeds": len(results.seeds(arm))}
        row |= {metric.replace("_", " "): shown(results.value(arm, metric)) for metric in SHOWN}
        for few in FEW:
            row[f"distance in {few} steps"] = shown(results.value(arm, "frechet_distance", f"in-{few}-steps"))
        for by, name in GUIDED.items():
            scale, value = results.best(arm, by=by)
            row[name] = f"{shown(value)} at {scale:g}" if value else "—"
        for metric, name in CONVERGED.items():
            final = results.curve("texture", metric, images, steps)[-1:]
            seen = reached(results.curve(arm, metric, images, steps), final[0][1]) if final else None
            row[f"times faster than texture alone in {name}"] = "—" if seen is None else f"{images * steps / seen:.2g}"
        listed.append(row)
    return listed


def limits(folder: Path) -> list[dict[str, Any]]:
    """What `benchmarks.study.semantics` measured: one row per arm, seed and kind of semantics."""
    paths = sorted(folder.glob("semantics/*.json"))
    return [row for path in paths for row in files.read_json(path, "measurement")["rows"]]


def plots(results: Results, images: int, steps: int) -> Figure:
    """Distance by offset, the fronts of precision and recall and of distance over guidance, and convergence."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (by_offset, front), (by_scale, convergence) = figure.subplots(2, 2)
    offsets = sorted(float(arm.removeprefix("offset-")) for arm in results.found if arm.startswith("offset-"))
    for what, style in (("unguided", "o-"), ("guidance", "s--"), ("weak", "^:")):
        values = [
            results.value(arm, "frechet_distance") if what == "unguided" else results.best(arm, by=what)[1]
            for arm in (f"offset-{delta:g}" for delta in offsets)
        ]
        points = [(delta, *value) for delta, value in zip(offsets, values, strict=True) if value]
        if points:
            x, y, half = zip(*points, strict=True)
            by_offset.errorbar(x, y, half, fmt=style, capsize=3, label=GUIDED.get(what, what))
            by_offset.legend()
    for colour, arm in enumerate(arm for arm in DRAWN if arm in results.found):
        for by, style in (("guidance", "o:"), ("weak", "o-")):
            pairs = [results.front(arm, metric, by=by) for metric in ("precision", "recall", "frechet_distance")]
            precision, recall, distance = ([value.mean for _, value in pair] for pair in pairs)
            name = arm if by == "guidance" else None
            front.plot(recall, precision, style, color=f"C{colour}", label=name)
            by_scale.plot([scale for scale, _ in pairs[2]], distance, style, color=f"C{colour}")
        curve = results.curve(arm, "class_accuracy", images, steps)
        convergence.loglog([seen for seen, _ in curve], [value for _, value in curve], "o-")
        front.legend()
    by_offset.set(xlabel="offset Δ", ylabel="Fréchet distance")
    front.set(xlabel="recall", ylabel="precision", title="dotted: guided by the null class; line: AutoGuidance")
    by_scale.set(xlabel="guidance", ylabel="Fréchet distance")
    convergence.set(xlabel="images seen", ylabel="share of unguided images not recognised")
    return figure


def write(folder: Path, name: str, images: int, steps: int) -> Path:
    """Write the page of a data set, `study-NAME.md`, with its picture and its numbers; give its path."""
    results = Results(folder)
    page, picture, numbers = (folder.parent / f"study-{name}{suffix}" for suffix in (".md", ".png", ".json"))
    with files.atomic_write(picture) as partial:
        plots(results, images, steps).savefig(partial, format="png", dpi=110)
    checked, measured, limited = claims(results), rows(results, images, steps), limits(folder)
    found = {"claims": checked, "arms": measured, "semantics": limited, "samples": results.means()}
    files.write_json(numbers, found | {"images a step": images, "steps": steps})
    command = f"python -m benchmarks.study.semantics {name}"
    what_limits = f"\n## What limits an arm\n\n    {command}\n\n{table(limited)}\n" if limited else ""
    text = f"""# Study: {name}

{summary(checked)}

    python -m benchmarks.study {name}

Each arm is a network of the same size that saw the same {images * steps:,} images, in the same order. Values are means
over seeds with 95 % intervals that cover the draw of the samples and the spread over seeds: what effects of arms and of
seeds leave unexplained, since all arms share a seed's noise (where all arms have one seed: the draw alone). They do not
cover that the best of a few scales of guidance was chosen. An ordering is checked on the seeds that both arms have;
it holds if the intervals do not overlap. {bounds(folder)}

![distance by offset, fronts and convergence]({picture.name})

{table(checked) if checked else ""}

{table(measured) if measured else ""}
{what_limits}"""
    files.write_text(page, text)
    return page
