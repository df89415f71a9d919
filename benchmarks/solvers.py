"""Error over function evaluations (NFE) of each solver, on an exact velocity field and on models/shapes.

Exact field: a mixture of 16 Gaussians in 32 texture and 16 semantic dimensions, mean 0 and variance 1 as normalised
latents have them; offset 0.3. The error is the median over samples of the texture's relative error against dopri5 at a
tolerance of 1e-10, restarted at knots. Numbers are the same on every machine, up to rounding. Baseline: dopri5 over the
whole of [0, 1], across the knots, as the published sampler does.

models/shapes: guidance 2 by the null class, float32, against dopri5 at 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import MODEL, Row, Setting
from sfd.evaluation.metrics import Gaussian, frechet_distance, gaussian
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model, load_model
from sfd.latents import TEXTURE, CompositeLatent, Stream
from sfd.models.toy import GaussianMixture
from sfd.sampling import initial_noise, integrate
from sfd.schedule import build_schedule
from sfd.utils import rng

LATENT = CompositeLatent(
    streams=(Stream(name="texture", channels=32, grid=1), Stream(name="semantic", channels=16, grid=1))
)
SCHEDULE = build_schedule({"name": "offset", "delta": 0.3}, LATENT.names)
COMPONENTS, SAMPLES = 16, 64
TOLERANCES = [10**-e for e in np.arange(1, 7.5, 0.5).tolist()]
STEPS = [6, 9, 12, 15, 18, 21, 24, 30, 36, 48, 60, 80, 100, 140, 200]  # function evaluations, of all fixed-step solvers
TARGETS = [1e-2, 1e-3, 1e-4, 2e-5]
BASELINE = "dopri5, across knots"
DRAWN, AT_ONCE = 10_000, 1000  # samples for a distribution, and per batch
IMAGES, PUBLISHED_BATCH = 40, 4  # of models/shapes, and of those that the published sampler integrates together


def dopri5(rtol: float, **more: Any) -> dict[str, Any]:
    """Arguments of `integrate` for dopri5."""
    return {"solver": "dopri5", "options": {"rtol": rtol, "atol": rtol / 1000}, **more}


def fixed(nfe: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fixed-step solvers at these numbers of function evaluations."""
    for n in nfe:
        yield "euler", {"solver": "euler", "steps": n}
        if n >= 6 and n % 2 == 0:
            yield "heun", {"solver": "heun", "steps": n // 2}
        for order in (2, 3):
            yield f"multistep, order {order}", {"solver": "multistep", "steps": n, "options": {"order": order}}


def mixture() -> GaussianMixture:
    """Means of standard deviation 0.8, standard deviations from 0.3 to 0.9."""
    generator = rng.generator(0, "solvers")
    shape = (COMPONENTS, LATENT.size)
    means, stds = 0.8 * generator.standard_normal(shape), generator.uniform(0.3, 0.9, shape)
    weights = torch.ones(COMPONENTS, dtype=torch.float64)
    return GaussianMixture(LATENT, weights, torch.from_numpy(means), torch.from_numpy(stds))


def texture_errors(latent: CompositeLatent, x: Tensor, reference: Tensor) -> Tensor:
    """Relative error of each sample's texture: (B,)."""
    ours, theirs = (latent.unpack(t)[TEXTURE].flatten(1) for t in (x, reference))
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)


def exact(setting: Setting) -> list[Row]:
    """NFE of each solver at equal error on the exact field; `nfe` and `error` hold its whole curve."""
    data, noise = mixture(), initial_noise(range(SAMPLES), LATENT).double()
    reference = integrate(data.velocity, noise, SCHEDULE, LATENT, **dopri5(1e-10)).x
    runs = [(BASELINE, dopri5(rtol, knots=False)) for rtol in TOLERANCES]
    runs += [("dopri5", dopri5(rtol)) for rtol in TOLERANCES]
    runs += sorted(fixed(STEPS), key=lambda run: run[0])
    curves: dict[str, list[tuple[int, float]]] = {}
    for method, how in runs:
        result = integrate(data.velocity, noise, SCHEDULE, LATENT, **how)
        error = texture_errors(LATENT, result.x, reference).median().item()
        curves.setdefault(method, []).append((result.nfe, error))
    return [{"method": m} | {f"{e:g}": nfe_at(c, e) for e in TARGETS} | _columns(c) for m, c in curves.items()]


def _columns(curve: list[tuple[int, float]]) -> Row:
    nfe, error = zip(*sorted(curve), strict=True)
    return {"nfe": list(nfe), "error": list(error)}


def nfe_at(curve: Sequence[tuple[int, float]], error: float) -> int | None:
    """Interpolate, on logarithms, the NFE from which the error stays at or below `error`; None if it does not."""
    points = sorted(dict(sorted(curve, reverse=True)).items())  # the smallest error of an NFE
    if points[-1][1] > error:
        return None
    for (n0, e0), (n1, e1) in reversed(list(pairwise(points))):
        if e0 > error:
            share = np.log(e0 / error) / np.log(e0 / e1)
            return round(float(n0 * (n1 / n0) ** share))
    return points[0][0]


def moments(data: GaussianMixture) -> Gaussian:
    """Mean and covariance of a mixture."""
    mean = data.weights @ data.means
    spread = torch.einsum("c,ci,cj->ij", data.weights, data.means, data.means) - torch.outer(mean, mean)
    return Gaussian(mean.numpy(), (torch.diag(data.weights @ data.stds**2) + spread).numpy(), count=0)


def stochastic(setting: Setting, count: int = DRAWN, steps: Sequence[int] = (6, 12, 24)) -> list[Row]:
    """How far the distribution of samples is from the mixture, of `sde` and of `heun`.

    `sde` adds noise that leads each sample elsewhere, so it has no error; it must keep the distribution. Compared are
    the Fréchet distance to the exact mean and covariance and the mean log-density under the mixture, which sees what
    two moments do not. Samples drawn from the mixture, and converged ones, show the noise of both numbers.
    """
    data, truth, ends = mixture(), moments(mixture()), torch.ones(len(LATENT.names))

    def row(method: str, nfe: int, x: Tensor) -> Row:
        density = torch.cat([data.log_density(part, ends) for part in x.split(AT_ONCE)]).mean().item()
        distance = frechet_distance(truth, gaussian(x.numpy()))
        return {"method": method, "nfe": nfe, "frechet_distance": distance, "log_density": density}

    runs: list[tuple[str, dict[str, Any]]] = [("dopri5, rtol 1e-5", dopri5(1e-5))]
    for n in steps:
        runs += [("heun", {"solver": "heun", "steps": n})]
        runs += [("sde, noise 0.5", {"solver": "sde", "steps": n, "options": {"noise": 0.5}})]
    rows = [row("drawn from the mixture", 0, data.sample(count, seed=0))]
    for method, how in runs:
        results = []
        for first in range(0, count, AT_ONCE):
            seeds = range(first, min(first + AT_ONCE, count))
            noise = initial_noise(seeds, LATENT).double()
            results.append(integrate(data.velocity, noise, SCHEDULE, LATENT, seeds=seeds, **how))
        rows.append(row(method, max(r.nfe for r in results), torch.cat([r.x for r in results])))
    return rows


class Solved(NamedTuple):
    """Latents (B, N) on the CPU, and the mean NFE of the batches."""

    latents: Tensor
    nfe: int


def solve(
    model: Model, count: int, how: SamplingConfig, *, at_once: int = 0, knots: bool = True, stops: bool = True
) -> Solved:
    """Integrate seeds 0, 1, …, each of the class in turn, guided by the null class.

    Args:
        model: a model with classes.
        count: number of images.
        how: solver, steps and guidance.
        at_once: batch size; 0: all together.
        knots: False integrates [0, 1] as one interval, as the published sampler does.
        stops: False does not stop where a guidance interval ends, but compares times with it at each evaluation.
    """
    latents, nfe = [], []
    for first in range(0, count, at_once or count):
        seeds = range(first, min(first + (at_once or count), count))
        labels = torch.tensor(seeds, device=model.device) % len(model.classes)
        velocity = model.velocity_field(labels, how)
        result = integrate(
            velocity if stops else lambda x, t, velocity=velocity: velocity(x, t),
            initial_noise(seeds, model.composite).to(model.device),
            model.schedule,
            model.composite,
            solver=how.solver,
            steps=how.steps,
            options=how.options,
            seeds=seeds,
            knots=knots,
        )
        latents.append(result.x.cpu())
        nfe.append(result.nfe)
    return Solved(torch.cat(latents), round(sum(nfe) / len(nfe)))


def shapes(setting: Setting) -> list[Row]:
    """Median and largest error of dopri5 on models/shapes, as published and stopping at knots."""
    model = load_model(MODEL, setting.device)
    together = f"dopri5, rtol 1e-3, across knots, {PUBLISHED_BATCH} images at a time"
    runs = [(together, dopri5(1e-3), {"knots": False, "at_once": PUBLISHED_BATCH})]
    runs += [("dopri5, rtol 1e-3, across knots", dopri5(1e-3), {"knots": False})]
    runs += [("dopri5, rtol 1e-3", dopri5(1e-3), {})]
    reference = solve(model, IMAGES, SamplingConfig(**dopri5(1e-5), guidance=2.0)).latents
    rows = []
    for name, how, ways in runs:
        found = solve(model, IMAGES, SamplingConfig(**how, guidance=2.0), **ways)
        errors = texture_errors(model.composite, found.latents, reference)
        rows.append({"solver": name, "nfe": found.nfe, "median": errors.median().item(), "worst": errors.max().item()})
    return rows


def interval(setting: Setting) -> list[Row]:
    """Errors on models/shapes guided within an interval, stopping at its ends and not."""
    model = load_model(MODEL, setting.device)
    guidance: dict[str, Any] = {"guidance": 2.0, "interval": (0.2, 0.8)}
    reference = solve(model, IMAGES, SamplingConfig(**dopri5(1e-5), **guidance)).latents
    runs = [(f"dopri5, rtol {rtol:g}", dopri5(rtol)) for rtol in (1e-3, 1e-4)]
    runs += list(fixed((24,)))
    runs += [("multistep, order 3", {"solver": "multistep", "steps": 48})]
    rows = []
    for name, how in runs:
        row: Row = {"solver": name}
        for kind, stops in (("across the ends", False), ("stopping", True)):
            found = solve(model, IMAGES, SamplingConfig(**how, **guidance), stops=stops)
            errors = texture_errors(model.composite, found.latents, reference)
            row |= {f"{kind}: nfe": found.nfe, f"{kind}: median": errors.median().item()}
            row[f"{kind}: worst"] = errors.max().item()
        rows.append(row)
    return rows
