"""Sources and scales of guidance, and few steps, by network calls, on a trained run of photographs with a second head.

    python -m benchmarks.guidance RUN [--judge imagenet|run] [--samples 1000] [--guiding-model MODEL]
        [--student MODEL]

Samples are judged in features of a network that saw a million photographs, whose linear probe, trained on images that
the model never saw, tells classes apart; or by the run's own evaluation classifier. Rows are kept in RUN/guidance: the
same command resumes.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.few_steps import CALLS, TIMED, sampled
from benchmarks.measure import best_times
from benchmarks.probe import probed
from benchmarks.report import table
from benchmarks.study.work import SHOWN
from sfd.evaluation.evaluate import Metrics, evaluate, read_metrics
from sfd.evaluation.reference import Reference
from sfd.generation.directory import model_folder
from sfd.generation.model import Model, load_model
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.utils.device import choose_device
from sfd.utils.errors import Interrupted, SFDError

SCALES = {"null_class": (1.5, 2.0, 3.0), "inside": (1.25, 1.5, 2.0), "guiding_model": (1.5, 2.0, 3.0)}
WAYS: list[dict[str, Any]] = [{"guidance": 1.0, "steps": steps} for steps in (24, 12)]
for source, scales in SCALES.items():
    WAYS += [{"guidance": scale, "steps": steps, "guidance_from": source} for scale in scales for steps in (24, 12)]
WAYS += [{"steps": steps, "guidance_from": "student"} for steps in (8, 4, 2, 1)]
MULTISTEP = {"solver": "multistep", "options": {}}  # one evaluation per step, whatever the run has by default


def judge(pipeline: Pipeline) -> Reference:
    """Held-out images as a probe of ImageNet features sees them."""
    settings, cache = pipeline.recipe.evaluation.classifier, pipeline.folder.root / "guidance" / "features"
    if settings is None:
        raise SFDError("the recipe has no evaluation.classifier, which says how held-out images are divided")
    return probed("efficientnet_lite", pipeline.images.held_out, settings, cache, pipeline.device)


def measure(
    pipeline: Pipeline, against: Reference, judged_by: str, samples: int, others: dict[str, Path]
) -> list[dict[str, Any]]:
    """One row per way to sample, and one of as many real images that the model was trained on."""
    model, rows, folder = pipeline.model, [], pipeline.folder.root / "guidance"
    loaded = {kind: load_model(model_folder(path), pipeline.device) for kind, path in others.items()}
    labels = [k % len(model.classes) for k in range(samples)]
    for way in WAYS:
        source = way.get("guidance_from")
        kind = source if source in ("guiding_model", "student") else None
        if kind is not None and kind not in others:
            continue
        name = "-".join(str(value) for value in reversed(way.values()))
        path = folder / f"{f'{loaded[kind].identity[:8]}-' if kind else ''}{name}.{judged_by}.{samples}.json"
        if not path.exists():
            if kind == "student":
                images = sampled(loaded[kind], {"steps": way["steps"]}, samples)
            else:
                images = sampled(model, way | MULTISTEP, samples, loaded.get(kind or ""))
            evaluate(images, labels, against, name=name, sampling=way).write(path)
        rows.append(row(way, read_metrics(path)))
        print(rows[-1], flush=True)
    real = pipeline.images.training
    chosen = range(0, len(real), len(real) // samples)[:samples]
    found = evaluate(real.load(chosen), [real.labels[k] for k in chosen], against, name="real")
    return [*rows, row({"guidance_from": "real training images"}, found)]


def times(model: Model, student: Model) -> list[dict[str, Any]]:
    """Time per image of sampling and decoding, guided by the null class and by the student, in turn."""
    guided: dict[str, Any] = {"steps": 24, "guidance": 1.5} | MULTISTEP
    ways = {"guided, 24 steps": partial(sampled, model, guided, TIMED)}
    ways |= {f"student, {k} steps": partial(sampled, student, {"steps": k}, TIMED) for k in (8, 4, 2, 1)}
    seconds = best_times(ways, 3, model.device)
    first = next(iter(seconds.values()))
    return [{"way": w, "image_milliseconds": 1e3 * s / TIMED, "ratio": first / s} for w, s in seconds.items()]


def row(way: dict[str, Any], found: Metrics) -> dict[str, Any]:
    """Quality with the interval of the distance, and what an image costs."""
    low, high = found.intervals["frechet_distance"]
    source, steps = way.get("guidance_from"), way.get("steps")
    return {
        "guidance_from": source or "none",
        "guidance": way.get("guidance"),
        "network_calls": steps and steps * CALLS.get(source or "", 1),
        **{name: getattr(found, name) for name in SHOWN},
        "interval": f"{low:.3g} to {high:.3g}",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.guidance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--judge", choices=("imagenet", "run"), default="imagenet")
    parser.add_argument("--guiding-model", type=Path, help="for AutoGuidance, such as an earlier checkpoint's model")
    parser.add_argument("--student", type=Path, help="a model that `sfd distill` made from this one")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    given = parser.parse_intermixed_args(arguments)
    others = {"guiding_model": given.guiding_model, "student": given.student}
    try:
        pipeline = Pipeline(load_recipe(given.run / "recipe.yaml"), given.run, choose_device(given.device))
        against = pipeline.evaluator.reference() if given.judge == "run" else judge(pipeline)
        paths = {kind: path for kind, path in others.items() if path}
        print(table(measure(pipeline, against, given.judge, given.samples, paths)))
        if given.student:
            print(table(times(pipeline.model, load_model(model_folder(given.student), pipeline.device))))
    except Interrupted:
        sys.exit("stopped; the same command resumes")
    except SFDError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
