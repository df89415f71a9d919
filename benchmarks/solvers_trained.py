"""Error and sample quality over evaluations of each solver, on the trained model that ships with the project.

    python -m benchmarks.solvers_trained --images 2000 --out runs/benchmarks/solvers_trained

The same seeds and classes throughout, guidance 2 by the null class. Error: the median over images of the texture's
relative error against dopri5 at a tolerance of 1e-4, restarted at knots. Quality: Fréchet distance and class accuracy
through a classifier that is trained here on first use, on images that the model never saw. Samples of `sde` are others
than the converged ones by intent, so they have a quality and no error. Then what evaluations of the weak model are
worth: `weak_every`. Evaluations are those of the strong model. Writes solvers_trained.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sfd.generation.generate import SamplingConfig, check_sampling, decode, generate
from torch import Tensor

from benchmarks.guided_model import solve, texture_errors
from sfd.data.shapes import ShapesSource
from sfd.evaluation.evaluate import evaluate
from sfd.evaluation.extractors.classifier import ClassifierExtractor, load_classifier
from sfd.evaluation.reference import Reference, reference_of
from sfd.generation.model import Model, load_model
from sfd.training.tasks.classifier import ClassifierSettings, divide, train_classifier
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError

MODEL = Path(__file__).parent.parent / "models" / "shapes"
HELD_OUT, HELD_OUT_SEED = 20_000, 1_000_003  # the model's data are of seed 0
AT_ONCE = 250  # images
BLIND = "dopri5, blind to knots"
STEPS = (6, 9, 12, 18, 24, 36, 50)
CONVERGED = SamplingConfig(solver="dopri5", options={"rtol": 1e-4, "atol": 1e-6}, guidance=2.0)


def settings(numbers: Sequence[int]) -> Iterator[tuple[str, SamplingConfig]]:
    """Name each way of sampling with these numbers of evaluations; `CONVERGED` is measured before them."""
    for knobs in ({}, {"rtol": 1e-2}, {"rtol": 1e-4}):
        yield "dopri5", SamplingConfig(solver="dopri5", options=knobs, guidance=2.0)
    for steps in numbers:
        yield "euler", SamplingConfig(solver="euler", steps=steps, guidance=2.0)
        if steps % 2 == 0:
            yield "heun", SamplingConfig(solver="heun", steps=steps // 2, guidance=2.0)
            yield "sde", SamplingConfig(solver="sde", steps=steps // 2, options={"noise": 0.5}, guidance=2.0)
        for order in (2, 3):
            method: dict[str, Any] = {"solver": "multistep", "options": {"order": order}, "guidance": 2.0}
            yield f"multistep, order {order}", SamplingConfig(**method, steps=steps)
            yield f"multistep, order {order}, budget time", SamplingConfig(**method, steps=steps, budget="time")
    for every in (2, 3, 4):
        for between in ("hold", "extrapolate"):
            reuse: dict[str, Any] = {"weak_every": every, "weak_between": between, "guidance": 2.0}
            yield f"weak every {every}, {between}", SamplingConfig(solver="multistep", steps=24, **reuse)


def sample(model: Model, count: int, chosen: SamplingConfig, first: int = 0) -> tuple[np.ndarray, Tensor, int, int]:
    """Images from seeds `first`, …, latents, evaluations of the strong model and those with the weak one."""
    labels, seeds = [k % len(model.classes) for k in range(count)], range(first, first + count)
    batches = list(generate(model, labels, seeds, chosen.model_copy(update={"batch_size": AT_ONCE})))
    images, latents = np.concatenate([b.images for b in batches]), torch.cat([b.latents for b in batches])
    return images, latents, max(b.evaluations for b in batches), max(b.weak_evaluations for b in batches)


def sample_blind(model: Model, count: int, chosen: SamplingConfig) -> tuple[np.ndarray, Tensor, int, int]:
    """Sample as `sample` does, but over the whole interval at once, blind to the knots."""
    sizes = [min(AT_ONCE, count - first) for first in range(0, count, AT_ONCE)]
    parts = [solve(model, n, chosen, first=AT_ONCE * k, knots=False) for k, n in enumerate(sizes)]
    latents = torch.cat([part.latents for part in parts])
    return decode(model, latents), latents, max(p.evaluations for p in parts), max(p.weak_evaluations for p in parts)


def judged(
    model: Model, reference: Reference, count: int, methods: Iterable[tuple[str, SamplingConfig]]
) -> Iterator[dict[str, Any]]:
    """Sample each way and judge the samples: a row for the converged ones, then one for each method."""
    labels = [k % len(model.classes) for k in range(count)]
    exact: Tensor | None = None
    for name, chosen in (("converged", CONVERGED), *methods):
        way = sample_blind if name == BLIND else sample
        images, latents, evaluations, weak = way(model, count, chosen)
        exact = latents if exact is None else exact
        error = None if chosen.solver == "sde" else texture_errors(model, latents, exact).median().item()
        metrics = evaluate(images, labels, reference, name=name)
        yield {
            "method": name,
            "evaluations": evaluations,
            "weak_evaluations": weak,
            "error": error,
            "frechet_distance": metrics.frechet_distance,
            "class_accuracy": metrics.class_accuracy,
        }


def judge(folder: Path, device: torch.device) -> Reference:
    """Train the classifier, or load the one that is there, and look at the real images that test it."""
    held_out, how = ShapesSource(HELD_OUT, HELD_OUT_SEED), ClassifierSettings()
    if (folder / "extractor").exists():
        extractor = load_classifier(folder / "extractor", device)
    else:
        network = train_classifier(held_out, how, folder, device=device)
        network.save(folder / "extractor")
        extractor = ClassifierExtractor(network)
    return reference_of(divide(held_out, how)[1], extractor, "held-out real images")


def whole_numbers(text: str) -> list[int]:
    """Read "12,18,24".

    Raises:
        SFDError: one of them is no whole number of at least 1.
    """
    for part in text.split(","):
        if not (part.strip().isdecimal() and int(part) > 0):
            raise SFDError(f"--evaluations {text!r}: {part!r} is no number of evaluations; give some such as 12,18,24")
    return [int(part) for part in text.split(",")]


def choose(model: Model, numbers: Sequence[int], wanted: set[str]) -> list[tuple[str, SamplingConfig]]:
    """Pick what is measured beside `CONVERGED`: of the methods that are wanted, or of all, if none is named.

    Raises:
        SFDError: an unknown method, or one that no number of evaluations fits; or a number too small for a method.
    """
    chosen = [(name, how) for name, how in settings(numbers) if not wanted or name in wanted]
    for name in sorted(wanted - {name for name, _ in chosen}):
        known = dict(settings(STEPS))
        if name not in known:
            raise SFDError(f"there is no method {name!r}; --methods takes some of '{';'.join(known)}'")
        raise SFDError(f"{name} takes two evaluations a step, so give --evaluations an even number")
    for _, how in chosen:
        check_sampling(model.schedule, model.composite, how, has_weak=True)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description="Error and sample quality over evaluations on models/shapes.")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--methods", help="only these, such as 'euler;multistep, order 3'  [default: all]")
    parser.add_argument("--evaluations", default=",".join(map(str, STEPS)), help="of the fixed-step methods")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/solvers_trained"), help="folder to write to")
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error(f"--images must be at least 1, not {arguments.images}")
    device = choose_device("auto")
    model = load_model(MODEL, device)
    try:
        numbers, wanted = whole_numbers(arguments.evaluations), (arguments.methods or "").split(";")
        chosen_methods = choose(model, numbers, {name.strip() for name in wanted} - {""})
    except SFDError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    reference = judge(arguments.out / "evaluator", device)
    rows: list[dict[str, Any]] = []
    for row in judged(model, reference, arguments.images, chosen_methods):
        rows.append(row)
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        # After every row, since a CPU takes its time.
        (arguments.out / "solvers_trained.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
