"""Error and sample quality over evaluations of each solver, on the trained model that ships with the project.

    python benchmarks/solvers_trained.py --images 2000 --out runs/benchmarks/solvers_trained

The same seeds and classes throughout, guidance 2 by the null class. Error: the median over images of the texture's
relative error against dopri5 at a tolerance of 1e-4, restarted at knots. Quality: Fréchet distance and class accuracy
through a classifier that is trained here on first use, on images that the model never saw. Then what evaluations of
the weak model are worth: `weak_every`. Evaluations are those of the strong model. Writes solvers_trained.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfd.data.shapes import ShapesSource
from sfd.evaluation.evaluate import Reference, evaluate, measure
from sfd.evaluation.extractors import classifier
from sfd.generate import SampleSettings, generate
from sfd.model import TEXTURE_STREAM, Model, load_model
from sfd.resources import choose_device

MODEL = Path(__file__).parent.parent / "models" / "shapes"
HELD_OUT, HELD_OUT_SEED = 20_000, 1_000_003  # the model's data are of seed 0
STEPS = (6, 9, 12, 18, 24, 36, 50)
CONVERGED = SampleSettings(solver="dopri5", options={"rtol": 1e-4, "atol": 1e-6}, guidance=2.0)


def settings(numbers: Sequence[int]) -> Iterator[tuple[str, SampleSettings]]:
    """Name each way of sampling with these numbers of evaluations; `CONVERGED` is measured before them."""
    for knobs in ({}, {"rtol": 1e-2}, {"rtol": 1e-4}):
        yield "dopri5", SampleSettings(solver="dopri5", options=knobs, guidance=2.0)
    for steps in numbers:
        yield "euler", SampleSettings(solver="euler", steps=steps, guidance=2.0)
        if steps % 2 == 0:
            yield "heun", SampleSettings(solver="heun", steps=steps // 2, guidance=2.0)
        for order in (2, 3):
            method: dict[str, Any] = {"solver": "multistep", "options": {"order": order}, "guidance": 2.0}
            yield f"multistep, order {order}", SampleSettings(**method, steps=steps)
            yield f"multistep, order {order}, budget time", SampleSettings(**method, steps=steps, budget="time")
    for every in (2, 3, 4):
        for between in ("hold", "extrapolate"):
            reuse: dict[str, Any] = {"weak_every": every, "weak_between": between, "guidance": 2.0}
            yield f"weak every {every}, {between}", SampleSettings(solver="multistep", steps=24, **reuse)


def sample(model: Model, count: int, chosen: SampleSettings, first: int = 0) -> tuple[np.ndarray, Tensor, int, int]:
    """Images from seeds `first`, …, latents, evaluations of the strong model and those with the weak one."""
    labels, seeds = [k % len(model.classes) for k in range(count)], range(first, first + count)
    batches = list(generate(model, labels, seeds, chosen.model_copy(update={"batch_size": 250})))
    images, latents = np.concatenate([b.images for b in batches]), torch.cat([b.latents for b in batches])
    return images, latents, max(b.evaluations for b in batches), max(b.weak_evaluations for b in batches)


def texture_errors(model: Model, x: Tensor, reference: Tensor) -> Tensor:
    ours, theirs = (model.composite.split(t)[TEXTURE_STREAM].flatten(1) for t in (x, reference))
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)


def judge(folder: Path, device: torch.device) -> Reference:
    """Train the classifier, or load the one that is there, and look at the real images that test it."""
    held_out, how = ShapesSource(HELD_OUT, HELD_OUT_SEED), classifier.ClassifierSettings()
    if (folder / "extractor").exists():
        extractor = classifier.load(folder / "extractor", device)
    else:
        extractor = classifier.train(held_out, how, folder, device=device)
    return measure(classifier.divide(held_out, how)[1], extractor, "held-out real images")


def main() -> None:
    parser = argparse.ArgumentParser(description="Error and sample quality over evaluations on models/shapes.")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--methods", help="only these, such as 'euler;multistep, order 3'  [default: all]")
    parser.add_argument("--evaluations", default=",".join(map(str, STEPS)), help="of the fixed-step methods")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/solvers_trained"), help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = choose_device("auto")
    model, reference = load_model(MODEL, device), judge(arguments.out / "evaluator", device)
    labels = [k % len(model.classes) for k in range(arguments.images)]
    numbers = [int(text) for text in arguments.evaluations.split(",")]
    wanted = set((arguments.methods or "").split(";")) - {""}
    rows: list[dict[str, Any]] = []
    exact: Tensor | None = None
    chosen_methods = [(name, chosen) for name, chosen in settings(numbers) if not wanted or name in wanted]
    for name, chosen in (("converged", CONVERGED), *chosen_methods):
        images, latents, evaluations, weak = sample(model, arguments.images, chosen)
        exact = latents if exact is None else exact
        metrics = evaluate(images, labels, reference, name=name)
        row = {
            "method": name,
            "evaluations": evaluations,
            "weak_evaluations": weak,
            "error": texture_errors(model, latents, exact).median().item(),
            "frechet_distance": metrics.frechet_distance,
            "class_accuracy": metrics.class_accuracy,
        }
        rows.append(row)
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        # After every row, since a CPU takes its time.
        (arguments.out / "solvers_trained.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
