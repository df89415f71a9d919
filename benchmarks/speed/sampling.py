"""Sampling: images a second, velocity errors, and guided sampling beside the published settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sfd.generation.generate import velocity_field
from torch import Tensor

from benchmarks.speed.measuring import (
    COMPOSITE,
    ROOT,
    SCHEDULE,
    Row,
    Setting,
    best_times,
    class_labels,
    network,
    working_memory,
)
from sfd.generation.model import Model, load_model
from sfd.guidance import VelocityField, guide
from sfd.models.dit import LightningDiT, flops
from sfd.models.inference import Inference, cannot_compile
from sfd.sampling import initial_noise, integrate

STEPS = 3  # of Euler's method in a timed sampling: what is timed is divided by it
# Guided evaluations that the trained demo model takes, as published with four images at a time and in the mean, and by
# default, to median errors of 0.031 and 0.004 (docs/sampling.md). Those on random weights say nothing.
EVALUATIONS = {"published": 81, "ours": 24}


def inferences(made: LightningDiT, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Name the ways to evaluate a network; each gives v̂ (B, N) of x (B, N), times (K,) and labels (B,)."""
    plain = Inference(made)

    def autocast(*arguments: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return plain(*arguments)

    ways: dict[str, Callable[..., Tensor]] = {"float32": plain, "autocast": autocast, "bf16": Inference(made, "bf16")}
    if cannot_compile(device) is None:
        ways["float32 compiled"] = Inference(made, compiled=True)
        ways["bf16 compiled"] = Inference(made, "bf16", compiled=True)
    return ways


def sampling(setting: Setting) -> list[Row]:
    """Images a second through one evaluation and a step of Euler's method, for each size and batch."""
    device, rows = setting.device, []
    for size, batch in setting.sizes:
        made = network(size).eval().requires_grad_(False).to(device)
        noise, labels = initial_noise(range(batch), COMPOSITE).to(device), class_labels(batch, device)
        how = {"solver": "euler", "steps": STEPS}
        ways = {n: partial(sampled, velocity_field(w, labels), noise, how) for n, w in inferences(made, device).items()}
        times = best_times(ways, setting.repeats, device)
        for name, seconds in times.items():
            rate = batch * STEPS / seconds
            row = {"size": size, "batch": batch, "way": name, "evaluated_images_per_second": rate}
            row |= {"ratio": times["float32"] / seconds, "flops_per_second": rate * flops(made.config)}
            rows.append(row)
        torch._dynamo.reset()  # it refuses to compile one function for many networks
    return rows


def sampled(velocity: VelocityField, noise: Tensor, how: dict[str, Any]) -> int:
    """Sample; give the evaluations spent."""
    return integrate(velocity, noise, SCHEDULE, COMPOSITE, **how).evaluations


def errors(setting: Setting) -> list[Row]:
    """Relative error of the demo model's velocity along a trajectory, against float32."""
    device = setting.device
    model = load_model(ROOT / "models" / "shapes", device)
    ways = inferences(model.transformer, device)
    labels = torch.arange(64, device=device) % len(model.classes)
    visited = trajectory(model, ways["float32"], labels)
    rows = []
    for name, way in ways.items():
        pairs = [(way(x, t, labels), ways["float32"](x, t, labels)) for x, t in visited]
        rows.append({"way": name, "error": max(((a - b).norm() / b.norm()).item() for a, b in pairs)})
    return rows


def trajectory(model: Model, way: Callable[..., Tensor], labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Follow twelve steps of sampling; give where they went: latents and times."""
    visited: list[tuple[Tensor, Tensor]] = []

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        visited.append((x, times))
        return way(x, times, labels)

    noise = initial_noise(range(len(labels)), model.composite).to(model.device)
    integrate(velocity, noise, model.schedule, model.composite, solver="euler", steps=12)
    return visited


def guided(setting: Setting) -> list[Row]:
    """Guided sampling beside the published settings: dopri5 over the whole interval in TF32, four images at a time.

    Decoding is left out. Images a second are those of `EVALUATIONS`, each at the rate of the ones that were timed.
    """
    device, rows = setting.device, []
    weak = network("B").eval().requires_grad_(False).to(device)
    for size, batch in setting.asked or (("XL", 128), ("XXL", 128)):
        made = network(size).eval().requires_grad_(False).to(device)
        published = {"solver": "dopri5", "options": {"rtol": 1e-3, "atol": 1e-6}, "knots": False}
        ours = {"solver": "multistep", "steps": EVALUATIONS["ours"], "options": {}}
        for name, count, precision, how in (("published", 4, "float32", published), ("ours", batch, "bf16", ours)):
            compiled = name == "ours" and cannot_compile(device) is None
            nets = [Inference(n, precision, compiled=compiled) for n in (made, weak)]
            labels, noise = class_labels(count, device), initial_noise(range(count), COMPOSITE).to(device)
            field = guide(*(velocity_field(n, labels) for n in nets), 1.5, COMPOSITE)
            way = partial(sampled, field, noise, how)
            torch.set_float32_matmul_precision("high" if name == "published" else "highest")
            try:
                seconds, timed = best_times({name: way}, 2, device)[name], way()
                working = working_memory(way, device)
            finally:
                torch.set_float32_matmul_precision("highest")
            rate = count * timed / seconds / EVALUATIONS[name]
            row = {"size": size, "way": name, "batch": count, "timed_evaluations": timed}
            row |= {"evaluations": EVALUATIONS[name], "images_per_second": rate, "working_bytes": working}
            rows.append(row)
        rows[-1]["ratio"] = rows[-1]["images_per_second"] / rows[-2]["images_per_second"]
        torch._dynamo.reset()
    return rows
