"""Sampling: images per second of evaluations, and errors of the velocity."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    COMPOSITE,
    MODEL,
    SCHEDULE,
    Row,
    Setting,
    best_times,
    class_labels,
    frozen,
)
from sfd.generation.model import Model, load_model
from sfd.guidance import VelocityField
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import flops
from sfd.models.inference import Inference
from sfd.sampling import initial_noise, integrate

STEPS = 3  # of Euler's method in a timed sampling


def velocities(net: LightningDiT, labels: Tensor, setting: Setting) -> dict[str, VelocityField]:
    """The velocity functions of a network, by the way to evaluate it."""
    plain = Inference(net).velocity(labels)

    def autocast(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(setting.device.type, torch.bfloat16):
            return plain(x, t)

    ways: dict[str, VelocityField] = {"float32": plain, "autocast": autocast}
    ways["bf16"] = Inference(net, "bf16").velocity(labels)
    if setting.compiles:
        ways["float32 compiled"] = Inference(net, compiled=True).velocity(labels)
        ways["bf16 compiled"] = Inference(net, "bf16", compiled=True).velocity(labels)
    return ways


def sampling(setting: Setting) -> list[Row]:
    """Images per second through one evaluation and a step of Euler's method."""
    device, rows = setting.device, []
    for size, batch in setting.sizes:
        net = frozen(size, device)
        noise, labels = initial_noise(range(batch), COMPOSITE).to(device), class_labels(batch, device)
        how = {"solver": "euler", "steps": STEPS}
        ways = {n: partial(sampled, v, noise, how) for n, v in velocities(net, labels, setting).items()}
        times = best_times(ways, setting.repeats, device)
        for name, seconds in times.items():
            rate = batch * STEPS / seconds
            row = {"size": size, "batch": batch, "way": name, "evaluated_images_per_second": rate}
            rows.append(row | {"ratio": times["float32"] / seconds, "flops_per_second": rate * flops(net.config)})
        torch._dynamo.reset()  # it refuses to compile one function for many networks
    return rows


def sampled(velocity: VelocityField, noise: Tensor, how: dict[str, Any]) -> int:
    """Sample, and give the NFE."""
    return integrate(velocity, noise, SCHEDULE, COMPOSITE, **how).nfe


def errors(setting: Setting) -> list[Row]:
    """Largest relative error of the velocity of models/shapes along a trajectory, against float32."""
    model = load_model(MODEL, setting.device)
    labels = torch.arange(64, device=setting.device) % len(model.classes)
    ways = velocities(model.transformer, labels, setting)
    visited = trajectory(model, ways["float32"], len(labels))
    rows = []
    for name, way in ways.items():
        pairs = [(way(x, t), ways["float32"](x, t)) for x, t in visited]
        rows.append({"way": name, "error": max(((a - b).norm() / b.norm()).item() for a, b in pairs)})
    return rows


def trajectory(model: Model, way: VelocityField, count: int) -> list[tuple[Tensor, Tensor]]:
    """Latents and times that twelve steps of sampling visit."""
    visited: list[tuple[Tensor, Tensor]] = []

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        visited.append((x, times))
        return way(x, times)

    noise = initial_noise(range(count), model.composite).to(model.device)
    integrate(velocity, noise, model.schedule, model.composite, solver="euler", steps=12)
    return visited
