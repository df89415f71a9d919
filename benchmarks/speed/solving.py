"""Solvers: evaluations at equal error, the distribution of stochastic samples, and what samples are worth."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from sfd.generation.generate import SamplingConfig

from benchmarks import solvers as exact
from benchmarks.solvers_trained import BLIND, MODEL, judged, settings
from benchmarks.speed.measuring import Row, Setting
from benchmarks.speed.quality import evaluator
from benchmarks.speed.report import FIGURE, draw_figure, keep_file
from sfd.generation.model import load_model
from sfd.utils.files import write_json

IMAGES, EVALUATIONS = 1000, (12, 18, 24, 36)
METHODS = "euler", "heun", "multistep, order 2", "multistep, order 3", "sde"
ROWS = "solvers-trained.json"


def solvers(setting: Setting) -> list[Row]:
    """Evaluations of each solver at equal error, on the exact velocity field of benchmarks/solvers.py."""
    return [
        {"method": name} | {error: None if n is None else round(n) for error, n in row.items()}
        for name, row in exact.at_all_settings(setting.out).items()
    ]


def keep_solvers(setting: Setting) -> None:
    """Keep the figure; the field is exact and its numbers the CPU's, whatever the device."""
    if setting.device.type == "cpu":
        shutil.copyfile(setting.out / "solvers.png", FIGURE.parent / "solvers.png")


def stochastic(setting: Setting) -> list[Row]:
    """Distance of the distribution that `sde` samples from the exact one, beside Heun's method."""
    return exact.distribution()


def trained(setting: Setting) -> list[Row]:
    """Error and quality of samples of models/shapes, by solver and evaluations."""
    model, against = load_model(MODEL, setting.device), evaluator(setting)
    rows = []
    for row in judged(model, against, IMAGES, methods()):
        rows.append(row)
        print(row, flush=True)
        write_json(setting.out / ROWS, rows)
    return rows


def methods() -> Iterator[tuple[str, SamplingConfig]]:
    """Name each way of sampling, with its settings."""
    for name in (BLIND, "dopri5"):
        yield name, SamplingConfig(solver="dopri5", options={"rtol": 1e-3, "atol": 1e-6}, guidance=2.0)
    fixed = [(name, how) for name, how in settings(EVALUATIONS) if name in METHODS]
    yield from sorted(fixed, key=lambda each: METHODS.index(each[0]))


def keep_trained(setting: Setting) -> None:
    """Keep the rows; the CPU's are drawn."""
    keep_file(setting.out / ROWS, ROWS, setting.device.type)
    if setting.device.type == "cpu":
        draw_figure("solvers_trained")
