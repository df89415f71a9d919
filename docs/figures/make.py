"""Draws the figures of docs/*.md, from the project's own code and from docs/results/benchmarks.json.

    python docs/figures/make.py [overview schedules times knots speed solvers solvers_trained training_curves
                                 editing]

All of them take about half a minute. They use models/shapes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sfd import flow
from sfd.editing import change_plan, keep_plan
from sfd.evaluation.figures import COLOURS, semantic_colours
from sfd.generation.model import Model, load_model
from sfd.latents import CompositeLatent, Stream
from sfd.models.toy import GaussianMixture
from sfd.sampling import initial_noise, integrate
from sfd.schedule import Schedule, build_schedule
from sfd.utils.errors import unknown

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "benchmarks.json"
SMOOTHED = 50  # steps of the mean that loss curves show
STREAMS = ("texture", "semantic")
OFFSET = {"name": "offset", "delta": 0.3}
PIXELS = {"dpi": 130, "facecolor": "white"}
SHOWN = (("star", 3), ("heart", 1), ("ring", 4))  # class and seed of the samples in the overview


def results(section: str) -> list[dict[str, Any]]:
    """The rows that `python -m benchmarks` published for a section, measured on a CPU."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["cpu"][section]["rows"]


def plain(axis: Axes, title: str, x: str, y: str = "") -> None:
    """Title, labels, a pale grid and no frame."""
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def states(model: Model, name: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base times (n,) of a sample, its semantic latents (n, C, h, w) and its decoded texture (n, H, W, 3)."""
    found = model.trajectory(name, seed, solver="heun", steps=48, guidance=2.0)
    shown = [min(found, key=lambda state: abs(state.u - u)) for u in np.linspace(0, 1, 14)[1:]]
    x = torch.cat([state.x for state in shown])
    return np.array([state.u for state in shown]), model.composite.unpack(x)["semantic"].numpy(), model.decode(x)


def overview() -> Figure:
    """The two clocks, and below them samples of models/shapes at the same base times."""
    model = load_model(HERE.parent.parent / "models" / "shapes", torch.device("cpu"))
    samples = [states(model, name, seed) for name, seed in SHOWN]
    base = samples[0][0]
    figure = Figure(figsize=(len(base) * 0.82 + 0.9, 6.4))
    sizes = (1.1, *(0.5, 1.0) * len(samples))
    grid = figure.add_gridspec(len(sizes), len(base), height_ratios=sizes, hspace=0.08, wspace=0.05)
    figure.subplots_adjust(left=0.08, right=0.995, top=0.95, bottom=0.01)
    clocks = figure.add_subplot(grid[0, :])
    step = 1 / len(base)
    u = torch.linspace(0, 1, 201, dtype=torch.float64)
    draw_streams(clocks, u, model.schedule.at(u).time, label=True)
    for knot in model.schedule.knots:
        clocks.axvline(knot, color="#808080", linewidth=1, linestyle=":")
    clocks.set_xlim(step / 2, 1 + step / 2)  # each column of images is centred on its base time
    clocks.set_xticks(base, [f"u = {b:.2f}" for b in base], fontsize=7)
    clocks.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    clocks.set_yticks([0, 1], ["noise", "data"], fontsize=8)
    clocks.spines[["right", "bottom"]].set_visible(False)
    clocks.legend(frameon=False, loc="lower right", fontsize=8)
    for row, (_, semantic, decoded) in enumerate(samples):
        for below, pictures, name in ((0, semantic_colours(semantic), "semantic"), (1, decoded, "texture")):
            for column, image in enumerate(pictures):
                axis = figure.add_subplot(grid[1 + 2 * row + below, column])
                axis.imshow(image, interpolation="nearest")
                axis.set_axis_off()
                if column == 0:
                    axis.text(-0.2, 0.5, name, ha="right", va="center", fontsize=8, transform=axis.transAxes)
    return figure


def schedules() -> Figure:
    """Times above, rates below; offset, synchronous, sequential."""
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey="row")
    specs = {
        "offset, Δ = 0.3": OFFSET,
        "synchronous (Δ = 0)": {"name": "synchronous"},
        "sequential (Δ = 1)": {"name": "sequential"},
    }
    for column, (title, spec) in enumerate(specs.items()):
        schedule = build_schedule(spec, STREAMS)
        for j, (start, end) in enumerate(schedule.segments):
            u = torch.linspace(start, end, 2, dtype=torch.float64)
            for axis, values in zip(axes[:, column], schedule.at(u, j), strict=True):
                draw_streams(axis, u, values, label=j == 0)
        for axis in axes[:, column]:
            for knot in schedule.knots:
                axis.axvline(knot, color="#808080", linewidth=1, linestyle=":")
        plain(axes[0, column], title, "", "stream time τ(u)" if column == 0 else "")
        plain(axes[1, column], "", "base time u", "rate τ′(u)" if column == 0 else "")
    axes[1, 1].legend(frameon=False, loc="lower center")
    return figure


def draw_streams(axis: Axes, u: torch.Tensor, values: torch.Tensor, label: bool) -> None:
    """One line a stream; the second dashed, so that both are seen where they coincide."""
    for k, name in enumerate(STREAMS):
        style = "-" if k == 0 else (0, (4, 2))
        axis.plot(u, values[:, k], color=COLOURS[k], linewidth=2.2, linestyle=style, label=name if label else None)


def times() -> Figure:
    """What share of training each stream spends where, at Δ = 0.3."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    schedule = build_schedule(OFFSET, STREAMS)
    normals = torch.from_numpy(np.random.default_rng(0).standard_normal(1_000_000))
    for axis, distribution in zip(axes, ("logit_normal", "uniform"), strict=True):
        seen = schedule.at(flow.sample_base_time(normals, distribution)).time.numpy()
        for k, name in enumerate(STREAMS):
            end = 0 if name == "texture" else 1
            resting = (seen[:, k] == end).mean()
            between = seen[(seen[:, k] > 0) & (seen[:, k] < 1), k]
            counts, edges = np.histogram(between, 50, (0, 1))
            label = f"{name} ({resting:.0%} rests at t = {end})"
            axis.stairs(counts * 50 / len(seen), edges, baseline=None, linewidth=2, color=COLOURS[k], label=label)
        plain(axis, f"u {distribution.replace('_', '-')}", "stream time t", "density in training")
        axis.set_ylim(0, 1.35)
        axis.legend(frameon=False, loc="lower center", fontsize=9)
    axes[1].set_ylabel("")
    return figure


def mixture() -> GaussianMixture:
    """Five Gaussians over texture (4 channels) and semantics (2), close enough for smooth paths between them."""
    composite = CompositeLatent(
        streams=(Stream(name="texture", channels=4, grid=1), Stream(name="semantic", channels=2, grid=1))
    )
    random = np.random.default_rng(0)
    means, stds = random.standard_normal((5, 6)), random.uniform(0.4, 0.8, (5, 6))
    return GaussianMixture(composite, torch.ones(5).double(), torch.from_numpy(means), torch.from_numpy(stds))


def knot_errors() -> dict[str, list[tuple[int, float, float]]]:
    """Evaluations and root mean square error on the mixture's exact velocity, by solver, with knots and blind."""
    exact = mixture()
    schedule: Schedule = build_schedule(OFFSET, STREAMS)
    noise = initial_noise(range(256), exact.composite).double()

    def run(solver: str, **settings: object) -> tuple[torch.Tensor, int]:
        result = integrate(exact.velocity, noise, schedule, exact.composite, solver=solver, **settings)  # type: ignore[arg-type]
        return result.x, result.nfe

    truth, _ = run("dopri5", options={"rtol": 1e-10, "atol": 1e-12})
    steps = (10, 13, 16, 20, 26, 32, 40, 52, 64, 80, 104, 130, 160)
    tolerances = tuple(10.0**-n for n in np.arange(2, 6.5, 0.5))
    settings = {
        "euler": [{"steps": n} for n in steps],
        "heun": [{"steps": n} for n in steps],
        "dopri5": [{"options": {"rtol": rtol, "atol": rtol / 1000}} for rtol in tolerances],
    }
    errors = {}
    for solver, tried in settings.items():
        for knots in (True, False):
            ends = [run(solver, knots=knots, **given) for given in tried]
            label = f"{solver}{'' if knots else ', blind'}"
            errors[label] = [(n, float((x - truth).square().mean().sqrt())) for x, n in ends]
    return errors


def knots() -> Figure:
    """Error over evaluations, stopping at knots and blind to them."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    errors = knot_errors()
    for axis, solver in zip(axes, ("euler", "heun", "dopri5"), strict=True):
        for label, colour, marker in ((solver, COLOURS[1], "o"), (f"{solver}, blind", COLOURS[4], "x")):
            evaluations, error = zip(*errors[label], strict=True)
            name = "blind to the knots" if "blind" in label else "stops at the knots"
            axis.loglog(evaluations, error, color=colour, marker=marker, markersize=5, linewidth=1.5, label=name)
        plain(axis, solver, "velocity evaluations", "error (RMS)" if solver == "euler" else "")
        axis.minorticks_off()
        axis.set_xticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
    axes[0].legend(frameon=False, loc="lower left", fontsize=9)
    return figure


def solvers_trained() -> Figure:
    """Error and Fréchet distance over evaluations, on models/shapes; dashed: the converged samples' distance."""
    rows = results("solvers_quality")
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    error, distance = figure.subplots(1, 2)
    for index, method in enumerate(sorted({row["method"] for row in rows[1:]})):
        chosen = [row for row in rows if row["method"] == method]
        again, colour = divmod(index, len(COLOURS))
        for axis, key in ((error, "error"), (distance, "frechet_distance")):
            x, y = [row["nfe"] for row in chosen], [row[key] for row in chosen]
            axis.plot(x, np.array(y, float), marker="os"[again], color=COLOURS[colour], label=method)
    error.set_yscale("log")
    distance.axhline(rows[0]["frechet_distance"], color="#666666", linestyle="--", linewidth=1)
    plain(error, "median relative error of the texture", "NFE")
    plain(distance, "Fréchet distance (dashed: converged)", "NFE")
    distance.legend(frameon=False, fontsize=8)
    return figure


def training_curves() -> Figure:
    """Loss curves of each way to train, and their relative difference from plain float32's; both smoothed."""
    rows = results("curves")
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    steps = rows[0]["steps"]
    width = SMOOTHED // (steps[1] - steps[0])
    reference = np.convolve(rows[0]["loss"], np.full(width, 1 / width), mode="valid")
    for index, row in enumerate(rows):
        mean = np.convolve(row["loss"], np.full(width, 1 / width), mode="valid")
        style = {"color": COLOURS[index], "linestyle": ("-", (0, (6, 3)), ":", "-")[index], "label": row["way"]}
        curves.plot(steps[width - 1 :], mean, **style)
        differences.plot(steps[width - 1 :], 100 * (mean / reference - 1), **style)
    plain(curves, f"training loss, mean of {SMOOTHED} steps", "step")
    plain(differences, "difference from float32 (%)", "step")
    curves.legend(frameon=False)
    return figure


def speed() -> Figure:
    """Sampling and training speed of each way, in multiples of the plain float32 path."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, section in zip(figure.subplots(1, 2), ("sampling", "training"), strict=True):
        rows = results(section)
        axis.barh([f"{r['size']}, batch {r['batch']}, {r['way']}" for r in rows], [r["ratio"] for r in rows])
        axis.axvline(1, color="k", linewidth=0.8)
        axis.set_title(f"{section}: times the plain float32 path", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    return figure


def solvers() -> Figure:
    """Error over NFE of each solver on the exact velocity field."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for index, row in enumerate(results("solvers_exact")):
        style = "k--" if index == 0 else "-"
        axis.loglog(row["nfe"], row["error"], style, marker="o", markersize=3, linewidth=1.2, label=row["method"])
    plain(axis, "", "NFE", "relative error of the texture (median)")
    axis.set(xlim=(5, 1000), ylim=(1e-7, 1))
    axis.legend(fontsize=8, frameon=False)
    return figure


def editing() -> Figure:
    """Samples, new textures on their plans, new plans for their textures' noise."""
    model, seeds = load_model(HERE.parents[1] / "models" / "shapes", torch.device("cpu")), list(range(6))
    classes = ["star", "heart", "ring", "crescent", "cross", "arrow"]
    sources = model.sample(classes, seeds=seeds, guidance=2, output="latent")
    others = [[100 * row + seed for seed in seeds] for row in (1, 2, 3)]
    rows = [sources, *(keep_plan(model, sources, fresh, plan_seeds=seeds) for fresh in others[:2])]
    rows.append(change_plan(model, seeds, others[2], classes=classes, guidance=2))
    figure = Figure(figsize=(7, 4.7), layout="constrained")
    for axis, image in zip(figure.subplots(len(rows), len(seeds)).flat, model.decode(torch.cat(rows)), strict=True):
        axis.imshow(image)
        axis.axis("off")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "overview": overview,
    "schedules": schedules,
    "times": times,
    "knots": knots,
    "speed": speed,
    "solvers": solvers,
    "solvers_trained": solvers_trained,
    "training_curves": training_curves,
    "editing": editing,
}


def main() -> None:
    """Draw the figures that the command line names, or all."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/*.md.")
    parser.add_argument("names", nargs="*", metavar="figure", help=f"{', '.join(FIGURES)}  [default: all]")
    names = parser.parse_args().names
    for name in names:
        if name not in FIGURES:
            parser.error(str(unknown("figure", name, FIGURES)))
    for name in names or FIGURES:
        FIGURES[name]().savefig(HERE / f"{name}.png", **PIXELS)
        print(HERE / f"{name}.png")


if __name__ == "__main__":
    main()
