"""Error over evaluations of each solver, where the velocity is known exactly; see docs/sampling.md.

    python benchmarks/solvers.py --out runs/benchmarks/solvers

Data: a mixture of 16 Gaussians in 32 texture and 16 semantic dimensions, mean 0 and variance 1 as normalised latents
have them; offset 0.3. The reference is dopri5 at a tolerance of 1e-10, restarted at knots. Error: the median over
samples of the texture's relative error. A sample on the edge between two components may go to the other one, which
says little of accuracy: the share of samples with an error above 0.1 is given apart. Baseline: dopri5 over the whole
of [0, 1], blind to the knots, as the published sampler is. Evaluations are calls, each of the whole batch, also where
images take steps of their own. Writes solvers.json and solvers.png; the numbers are the same on every machine, up to
rounding.

`sde` has no such error: the noise that it adds leads each sample elsewhere, and right so. What it must keep is the
distribution, so it is compared by that, beside Heun's method at as many evaluations: by the Fréchet distance of many
samples to the mixture's exact mean and covariance, all streams together, and by their mean log-density under the
mixture, which sees what two moments do not. Samples drawn from the mixture itself, and converged ones, show what of
both is chance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sfd.schedules import Schedule, build_schedule
from torch import Tensor

from sfd.evaluation.metrics import Gaussian, frechet_distance, gaussian
from sfd.latents import CompositeLatent, Stream
from sfd.models.toy import GaussianMixture
from sfd.sampling import initial_noise, integrate
from sfd.utils import rng

STREAMS = (Stream(name="texture", channels=32, grid=1), Stream(name="semantic", channels=16, grid=1))
COMPOSITE = CompositeLatent(streams=STREAMS)
COMPONENTS, SAMPLES, DELTA, FLIPPED = 16, 64, 0.3, 0.1
TOLERANCES = [10**-e for e in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0)]
STEPS = [6, 9, 12, 15, 18, 21, 24, 30, 36, 48, 60, 80, 100, 140, 200]
TARGETS = [1e-2, 1e-3, 1e-4, 2e-5]
BASELINE = "dopri5, blind to knots"
DRAWN, AT_ONCE, DISTRIBUTION_STEPS = 10_000, 1000, (6, 12, 24)  # samples, of a batch, of two evaluations each


class Point(NamedTuple):
    """One run of one solver."""

    method: str
    setting: float  # rtol, or number of steps
    evaluations: int
    error: float  # median over samples
    flipped: float  # share of samples with an error above 0.1


def data(seed: int = 0) -> GaussianMixture:
    """The mixture: means of standard deviation 0.8, standard deviations from 0.3 to 0.9."""
    generator = rng.generator(seed, "solvers")
    shape = (COMPONENTS, COMPOSITE.size)
    means, stds = 0.8 * generator.standard_normal(shape), generator.uniform(0.3, 0.9, shape)
    return GaussianMixture(
        COMPOSITE, torch.ones(COMPONENTS, dtype=torch.float64), torch.from_numpy(means), torch.from_numpy(stds)
    )


def methods() -> Iterator[tuple[str, list[tuple[float, dict[str, Any]]]]]:
    """Name each method, with the settings of its runs as `integrate` takes them."""
    published = [(r, {"solver": "dopri5", "options": {"rtol": r, "atol": r / 1000}}) for r in TOLERANCES]
    yield BASELINE, [(r, {**s, "knots": False}) for r, s in published]
    yield "dopri5", published
    for name, control in (("worst image", "worst"), ("each image", "image")):
        yield f"dopri5, {name}", [(r, {**s, "options": {**s["options"], "control": control}}) for r, s in published]
    for name, each, options in (
        ("euler", 1, {}),
        ("heun", 2, {}),
        ("multistep, order 2", 1, {"order": 2}),
        ("multistep, order 3", 1, {"order": 3}),
    ):
        runs = [(n, {"solver": name.split(",")[0], "steps": n, "options": options}) for n in STEPS if n // each >= 3]
        yield name, [(n // each, {**s, "steps": n // each}) for n, s in runs]
    yield (
        "multistep, order 3, budget time",
        [(n, {"solver": "multistep", "steps": n, "options": {"order": 3}, "budget": "time"}) for n in STEPS],
    )


def texture_errors(x: Tensor, reference: Tensor) -> Tensor:
    """Relative error of each sample's texture: (B,)."""
    ours, theirs = (COMPOSITE.unpack(t)["texture"].flatten(1) for t in (x, reference))
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)


def moments(mixture: GaussianMixture) -> Gaussian:
    """Mean and covariance of a mixture."""
    weights, means = mixture.weights, mixture.means
    mean = weights @ means
    spread = torch.einsum("c,ci,cj->ij", weights, means, means) - torch.outer(mean, mean)
    return Gaussian(mean.numpy(), (torch.diag(weights @ mixture.stds**2) + spread).numpy(), count=0)


def distribution(count: int = DRAWN) -> list[dict[str, Any]]:
    """How far the distribution of samples is from the mixture, of `sde` and of `heun`."""
    mixture, schedule, truth = data(), offset(), moments(data())
    converged = {"solver": "dopri5", "options": {"rtol": 1e-5, "atol": 1e-8}}
    runs: list[tuple[str, dict[str, Any]]] = [("dopri5, rtol 1e-5", converged)]
    for steps in DISTRIBUTION_STEPS:
        runs += [("heun", {"solver": "heun", "steps": steps})]
        runs += [("sde, noise 0.5", {"solver": "sde", "steps": steps, "options": {"noise": 0.5}})]

    def row(method: str, evaluations: int, x: Tensor) -> dict[str, Any]:
        ends = torch.ones(len(COMPOSITE.names))
        density = torch.cat([mixture.log_density(part, ends) for part in x.split(AT_ONCE)]).mean().item()
        distance = frechet_distance(truth, gaussian(x.numpy()))
        print(f"{method:34s} {evaluations:5d} {distance:9.4f} {density:9.3f}", flush=True)
        return {"method": method, "evaluations": evaluations, "frechet_distance": distance, "log_density": density}

    rows = [row("drawn from the mixture", 0, mixture.sample(count, seed=0))]
    for method, how in runs:
        results = []
        for first in range(0, count, AT_ONCE):
            seeds = range(first, min(first + AT_ONCE, count))
            noise = initial_noise(seeds, COMPOSITE).double()
            results.append(integrate(mixture.velocity, noise, schedule, COMPOSITE, seeds=seeds, **how))
        rows.append(row(method, max(r.evaluations for r in results), torch.cat([r.x for r in results])))
    return rows


def offset() -> Schedule:
    """The schedule."""
    return build_schedule({"name": "offset", "delta": DELTA}, COMPOSITE.names)


def measure() -> list[Point]:
    """Run each solver with each of its settings."""
    mixture, schedule = data(), offset()
    noise = initial_noise(range(SAMPLES), COMPOSITE).double()
    tight = {"rtol": 1e-10, "atol": 1e-12}
    reference = integrate(mixture.velocity, noise, schedule, COMPOSITE, solver="dopri5", options=tight).x
    points = []
    for method, runs in methods():
        for setting, arguments in runs:
            result = integrate(mixture.velocity, noise, schedule, COMPOSITE, **arguments)
            errors = texture_errors(result.x, reference)
            flipped = (errors > FLIPPED).double().mean().item()
            points.append(Point(method, setting, result.evaluations, errors.median().item(), flipped))
            print(
                f"{method:34s} {setting:9.3g} {points[-1].evaluations:5d} {points[-1].error:9.2e} {flipped:6.3f}",
                flush=True,
            )
    return points


def evaluations_at(points: Sequence[Point], error: float) -> float | None:
    """Interpolate, on logarithms, how many evaluations bring the error down to the one asked for, and keep it there."""
    curve = sorted({p.evaluations: p.error for p in points}.items())
    if curve[-1][1] > error:
        return None
    last = next((k for k in range(len(curve) - 1, -1, -1) if curve[k][1] > error), None)
    if last is None:
        return float(curve[0][0])
    (n0, e0), (n1, e1) = curve[last], curve[last + 1]
    share = (np.log(e0) - np.log(error)) / (np.log(e0) - np.log(e1))
    return float(np.exp(np.log(n0) + share * (np.log(n1) - np.log(n0))))


def at_equal_error(points: Sequence[Point]) -> dict[str, dict[str, float | None]]:
    """Evaluations of each method at each error: method → error → evaluations, None where it was not reached."""
    names = dict.fromkeys(p.method for p in points)
    return {n: {f"{e:g}": evaluations_at([p for p in points if p.method == n], e) for e in TARGETS} for n in names}


def table(equal: dict[str, dict[str, float | None]]) -> str:
    """Evaluations at equal error, and their ratio to the baseline's, as Markdown."""
    lines = ["| error | " + " | ".join(f"{e:g}" for e in TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for name, row in equal.items():
        cells = []
        for error, n in row.items():
            base = equal[BASELINE][error]
            cells.append("—" if n is None else f"{n:.0f}" + (f" ({n / base:.2f})" if base and name != BASELINE else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(p.method for p in points):
        curve = sorted((p.evaluations, p.error) for p in points if p.method == name)
        blind = name == BASELINE
        axes.loglog(
            *zip(*curve, strict=True), "k--" if blind else "-", marker="o", markersize=3, linewidth=1.2, label=name
        )
    axes.set(
        xlabel="velocity evaluations", ylabel="relative error of the texture (median)", xlim=(5, 1000), ylim=(1e-7, 1)
    )
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=90)


def at_all_settings(out: Path) -> dict[str, dict[str, float | None]]:
    """Measure, write solvers.json and solvers.png, and give the evaluations at equal error."""
    points = measure()
    equal = at_equal_error(points)
    record = {"points": [p._asdict() for p in points], "evaluations_at_equal_error": equal}
    (out / "solvers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(points, out / "solvers.png")
    return equal


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description="Error over evaluations of each solver on an exact velocity field.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/solvers"), help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    equal = at_all_settings(out)
    distribution()
    print("\n" + table(equal))


if __name__ == "__main__":
    main()
