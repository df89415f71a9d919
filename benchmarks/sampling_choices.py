"""What docs/sampling.md chooses by: errors of solvers, budgets, step controls, guidance intervals and reuse.

    python -m benchmarks.sampling_choices [--only budgets,reuse] [--publish]

On models/shapes: seeds 0 to 39, four images a class, guidance 2 by the null class, in float32 on the CPU; the relative
error of the texture against dopri5 at a tolerance of 1e-5. On the exact field of benchmarks/solvers.py: seeds 0 to 63,
against dopri5 at 1e-10. Prints tables; --publish keeps them in docs/results and writes them into the page. Nothing here
is timed, and errors are the same on every machine, up to rounding and what adaptive steps make of it. A few minutes on
two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sfd.generation.generate import SamplingConfig
from torch import Tensor

from benchmarks import solvers
from benchmarks.guided_model import Solved, solve, texture_errors
from benchmarks.solvers_interval import DEVIATIONS, MEANS, SCALE
from benchmarks.solvers_trained import MODEL
from benchmarks.speed.measuring import ROOT, Row
from benchmarks.speed.report import page, table
from sfd.generation.model import Model, load_model
from sfd.guidance import VelocityField, guide
from sfd.models.toy import GaussianMixture
from sfd.sampling import Result, initial_noise, integrate
from sfd.utils import files
from sfd.utils.errors import unknown

PAGE = ROOT / "docs" / "sampling.md"
RESULTS = ROOT / "docs" / "results" / "sampling-choices.json"
IMAGES, INTERVAL = 40, (0.2, 0.8)
AT_ONCE = 4  # images that the published sampler integrates together
BUDGETS = "length", "time", "equal"


@cache
def shapes() -> Model:
    """The model that ships with the project."""
    return load_model(MODEL, torch.device("cpu"))


def dopri5(rtol: float, **options: Any) -> dict[str, Any]:
    """Give the settings of dopri5 at a tolerance."""
    return {"solver": "dopri5", "options": {"rtol": rtol, "atol": rtol / 1000, **options}}


def multistep(steps: int, order: int = 3, **others: Any) -> dict[str, Any]:
    """Give the settings of a multistep method."""
    return {"solver": "multistep", "steps": steps, "options": {"order": order}, **others}


def guided(how: dict[str, Any], interval: tuple[float, float] | None = None, **blind: bool) -> Solved:
    """Sample models/shapes with guidance."""
    return solve(shapes(), IMAGES, SamplingConfig(**how, guidance=SCALE, interval=interval), **blind)


@cache
def converged(interval: tuple[float, float] | None = None) -> Tensor:
    """Sample models/shapes as exactly as errors are measured against."""
    return guided(dopri5(1e-5), interval).latents


def seen(found: Solved, interval: tuple[float, float] | None = None) -> tuple[float, float]:
    """Give the median and the largest error of images of models/shapes."""
    errors = texture_errors(shapes(), found.latents, converged(interval))
    return errors.median().item(), errors.max().item()


def field(**reuse: Any) -> VelocityField:
    """Make the exact field, guided away from a wider mixture."""
    strong = solvers.data()
    weak = GaussianMixture(solvers.COMPOSITE, strong.weights, MEANS * strong.means, DEVIATIONS * strong.stds)
    return guide(strong.velocity, weak.velocity, SCALE, solvers.COMPOSITE, **reuse)


def exact(velocity: VelocityField, how: dict[str, Any]) -> Result:
    """Sample an exact field."""
    noise = initial_noise(range(solvers.SAMPLES), solvers.COMPOSITE).double()
    return integrate(velocity, noise, solvers.offset(), solvers.COMPOSITE, **how)


def median(x: Tensor, reference: Tensor) -> float:
    """Give the median error of samples of an exact field."""
    return solvers.texture_errors(x, reference).median().item()


def shapes_solvers() -> Iterator[Row]:
    """Errors of each solver on models/shapes."""
    yield as_published()
    runs = [("dopri5, rtol 1e-3, blind to knots", dopri5(1e-3), False), ("dopri5, rtol 1e-3", dopri5(1e-3), True)]
    runs += [(f"euler, {n} steps", {"solver": "euler", "steps": n}, True) for n in (24, 48)]
    runs += [(f"heun, {n} steps", {"solver": "heun", "steps": n}, True) for n in (6, 12, 24)]
    runs += [(f"multistep, order {order}", multistep(n, order), True) for order in (2, 3) for n in (12, 24, 48)]
    for name, how, knots in runs:
        found = guided(how, knots=knots)
        middle, worst = seen(found)
        yield {"solver": name, "evaluations": found.evaluations, "median": middle, "worst": worst}


def as_published() -> Row:
    """Errors of the published settings; the evaluations of a batch in the mean."""
    how = SamplingConfig(**dopri5(1e-3), guidance=SCALE)
    found = [solve(shapes(), AT_ONCE, how, first=first, knots=False) for first in range(0, IMAGES, AT_ONCE)]
    errors = texture_errors(shapes(), torch.cat([part.latents for part in found]), converged())
    mean = round(sum(part.evaluations for part in found) / len(found))
    row: Row = {"solver": f"dopri5, rtol 1e-3, blind to knots, {AT_ONCE} images at a time", "evaluations": mean}
    return row | {"median": errors.median().item(), "worst": errors.max().item()}


def budgets() -> Iterator[Row]:
    """Median errors of multistep of order 3 by how steps are divided over segments."""
    velocity = solvers.data().velocity
    reference = exact(velocity, dopri5(1e-10)).x
    for steps in (12, 15, 18, 24, 36):
        row: Row = {"steps": steps}
        for budget in BUDGETS:
            how = multistep(steps, budget=budget)
            row[f"{budget}, exact field"] = median(exact(velocity, how).x, reference)
        for budget in BUDGETS:
            row[f"{budget}, models/shapes"] = seen(guided(multistep(steps, budget=budget)))[0]
        yield row


def controls() -> Iterator[Row]:
    """Errors of dopri5 on the exact field by whose error decides its steps."""
    velocity = solvers.data().velocity
    reference = exact(velocity, dopri5(1e-10)).x
    for rtol in (1e-3, 1e-4, 1e-5):
        for control in ("batch", "worst", "image"):
            result = exact(velocity, dopri5(rtol, control=control))
            errors, own = solvers.texture_errors(result.x, reference), result.image_evaluations
            row: Row = {"rtol": f"{rtol:g}", "control": control, "calls": result.evaluations}
            row |= {"own_least": own.min().item(), "own_mean": round(own.double().mean().item())}
            yield row | {"own_most": own.max().item(), "median": errors.median().item(), "worst": errors.max().item()}


def guidance_interval() -> Iterator[Row]:
    """Errors on models/shapes where guidance acts within an interval, blind to its ends and stopping at them."""
    runs = [("dopri5, rtol 1e-3", dopri5(1e-3)), ("dopri5, rtol 1e-3, each image", dopri5(1e-3, control="image"))]
    runs += [("dopri5, rtol 1e-4", dopri5(1e-4)), ("euler", {"solver": "euler", "steps": 24})]
    runs += [("heun", {"solver": "heun", "steps": 12}), ("multistep, order 2", multistep(24, order=2))]
    runs += [("multistep, order 3", multistep(n)) for n in (24, 48)]
    for name, how in runs:
        row: Row = {"solver": name}
        for kind, jumps in (("blind", False), ("stopping", True)):
            found = guided(how, INTERVAL, jumps=jumps)
            middle, worst = seen(found, INTERVAL)
            row[f"{kind}: evaluations, weak ones"] = f"{found.evaluations}, {found.weak_evaluations}"
            row |= {f"{kind}: median": middle, f"{kind}: worst": worst}
        yield row


def reuse() -> Iterator[Row]:
    """Median errors of multistep of order 3 where the weak velocity is evaluated once in several times, or each."""
    reference = exact(field(), dopri5(1e-10)).x
    runs = [(n, 1, "hold") for n in (18, 24)]
    runs += [(24, every, between) for every in (2, 3) for between in ("hold", "extrapolate")]
    for steps, every, between in (*runs, (36, 1, "hold"), (36, 2, "extrapolate")):
        how: dict[str, Any] = {"weak_every": every, "weak_between": between}
        found = guided(multistep(steps, **how))
        error = median(exact(field(**how), multistep(steps)).x, reference)
        named = "none" if every == 1 else f"every {every}, {'held' if between == 'hold' else 'extrapolated'}"
        row: Row = {"steps": steps, "reuse": named, "network_calls": found.evaluations + found.weak_evaluations}
        yield row | {"error, exact field": error, "error, models/shapes": seen(found)[0]}


TABLES: dict[str, Callable[[], Iterator[Row]]] = {
    each.__name__: each for each in (shapes_solvers, budgets, controls, guidance_interval, reuse)
}


def publish(tables: dict[str, list[Row]], results: Path = RESULTS, path: Path = PAGE) -> None:
    """Keep tables in place of what was kept of them, and write them into the page."""
    kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    kept |= tables
    files.write_text(results, json.dumps(kept, indent=1) + "\n")
    files.write_text(path, page(path.read_text(encoding="utf-8"), kept))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Errors that docs/sampling.md chooses by.")
    parser.add_argument("--only", default="", help=f"tables, comma-separated, of {', '.join(TABLES)}")
    parser.add_argument("--publish", action="store_true", help="keep the tables for docs/sampling.md")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name] or list(TABLES)
    for name in names:
        if name not in TABLES:
            parser.error(str(unknown("table", name, TABLES)))
    for name in names:
        rows = list(TABLES[name]())
        print(f"\n## {name}\n\n{table(rows)}", flush=True)
        if arguments.publish:
            publish({name: rows})


if __name__ == "__main__":
    main()
