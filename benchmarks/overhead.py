"""Time outside of the network: what a loop takes beyond losses, gradients and AdamW, or a sampler beyond velocities.

The plain path reads images one by one, draws noise and times in the step, uses no worker threads, updates the EMA
weight by weight and reads each loss at each step; it samples by dopri5 as published, with times as tensors. Networks,
losses and optimizer are the same on both sides, float32 and not compiled.

On a CPU the time outside of the network is that of a sampling less that of each evaluation in it; on a GPU, which works
asynchronously, less that of as many bare evaluations.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchdiffeq import odeint

from benchmarks.demo import RECIPE, prepared
from benchmarks.measure import COMPOSITE, SCHEDULE, Row, Setting, class_labels, frozen, wait
from benchmarks.sampling import NFE
from sfd import flow
from sfd.data.shards import FEATURES, LatentSet
from sfd.guidance import VelocityField
from sfd.models.dit import LightningDiT
from sfd.models.inference import Inference
from sfd.run.latents import find_latents
from sfd.run.recipe import load_recipe
from sfd.run.transformer import transformer_config
from sfd.sampling import DEFAULT_STEPS, initial_noise, integrate
from sfd.schedule import build_schedule
from sfd.training import trainer
from sfd.training.config import TrainSettings
from sfd.training.tasks.diffusion import DiffusionTask, LossSettings

SIZE, BATCH, STEPS = "tiny", 256, 20  # of the training that is timed: the demo's, where the network takes least
DELTA = 0.3


class Bare:
    """Steps on one batch: losses, gradients, clipping and AdamW."""

    def __init__(self, task: DiffusionTask, settings: TrainSettings, device: torch.device) -> None:
        self.task, self.network, self.device = task, task.model.to(device).train(), device
        self.held = {k: v.to(device) for k, v in task.batch(0, range(settings.batch_size)).items()}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step."""
        return self.held

    def finish(self, losses: dict[str, Tensor]) -> None:
        """What follows an update."""

    def __call__(self, steps: int) -> float:
        """Take steps; give seconds per step."""
        start = time.perf_counter()
        for step in range(steps):
            losses = self.task.loss(self.network, self.batch(step))
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.finish(losses)
        wait(self.device)
        return (time.perf_counter() - start) / steps


class Plain(Bare):
    """The same steps with everything around them done when it is needed."""

    def __init__(self, task: DiffusionTask, settings: TrainSettings, device: torch.device) -> None:
        super().__init__(task, settings, device)
        self.size = settings.batch_size
        self.ema = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        self.log: list[dict[str, float]] = []
        self.order = torch.randperm(len(task.latents)).tolist()

    def item(self, index: int) -> dict[str, Tensor]:
        """Read one image's latents."""
        latents, composite = self.task.latents, self.task.composite
        numbers, flips = np.array([index]), (torch.rand(1) < 0.5).numpy()
        read = {name: latents.read(name, numbers, flips) for name in composite.names}
        item = {"x1": composite.pack(composite.normalize(read))[0], "label": latents.labels[index]}
        if self.task.settings.repa:
            item["features"] = latents.read(FEATURES, numbers, flips)[0]
        return item

    def batch(self, step: int) -> dict[str, Tensor]:
        items = [self.item(self.order[(step * self.size + i) % len(self.order)]) for i in range(self.size)]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        u = flow.sample_base_time(torch.randn(self.size), "logit_normal")[:, None]
        batch["x0"] = torch.randn_like(batch["x1"])
        batch["times"] = torch.cat([(1 + DELTA) * u - DELTA, (1 + DELTA) * u], 1).clamp(0, 1)
        batch["labels"] = torch.where(torch.rand(self.size) < 0.1, self.task.null_class, batch.pop("label"))
        return {name: value.to(self.device) for name, value in batch.items()}

    @torch.no_grad()
    def finish(self, losses: dict[str, Tensor]) -> None:
        for name, parameter in self.network.named_parameters():
            self.ema[name].mul_(0.9999).add_(parameter, alpha=1e-4)
        self.log.append({name: value.item() for name, value in losses.items() if value.ndim == 0})


def training_overhead(latents: LatentSet, rounds: int, folder: Path, device: torch.device) -> list[Row]:
    """Milliseconds of a training step outside of network and optimizer, plain and the project's.

    Each round takes a few steps of each way; medians over rounds count, of a step and of what it takes beyond the bare
    one of its round, so that a machine that slows down does so for all.
    """
    recipe = load_recipe(RECIPE, [f"transformer.size={SIZE}"])
    config = transformer_config(recipe, latents)
    schedule = build_schedule(recipe.schedule, config.composite.names)
    task = DiffusionTask(LightningDiT(config), latents, schedule, LossSettings(), seed=0, batch_size=BATCH)
    settings = TrainSettings(steps=10**6, batch_size=BATCH, learning_rate=1e-5, ema=0.9999)
    shutil.rmtree(folder, ignore_errors=True)
    ours = trainer.Trainer(task, settings, folder, device)

    def project(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            ours.train_step()
            ours.log_step()
        wait(device)
        return (time.perf_counter() - start) / steps

    ways: list[Callable[[int], float]] = [Bare(task, settings, device), Plain(task, settings, device), project]
    ours.log.start(0, [])
    with ours.running():
        for way in ways:
            way(2)
        seconds = np.array([[way(STEPS) for way in ways] for _ in range(rounds)])  # (rounds, ways)
    steps, outside = np.median(seconds, axis=0), np.median(seconds - seconds[:, :1], axis=0)
    what = f"training {SIZE}, batch {BATCH}"
    return [_row(what, name, steps[k], outside[k], outside[1]) for k, name in ((1, "plain"), (2, "project"))]


class TimedVelocity:
    """A velocity function that counts its calls and their seconds, as far as Python waits for them."""

    def __init__(self, velocity: VelocityField) -> None:
        self.velocity, self.seconds, self.calls = velocity, 0.0, 0
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, times: Tensor) -> Tensor:
        self.last, start = (x, times), time.perf_counter()
        out = self.velocity(x, times)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return out

    def bare(self, device: torch.device) -> float:
        """Seconds of as many calls at the last arguments, one after the other."""
        assert self.last is not None
        wait(device)
        start = time.perf_counter()
        for _ in range(self.calls):
            self.velocity(*self.last)
        wait(device)
        return time.perf_counter() - start


def published_sampling(velocity: VelocityField, noise: Tensor, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Sample as the published code does: dopri5 over [0, 1], all times as tensors of the batch."""

    def derivative(u: Tensor, x: Tensor) -> Tensor:
        us = torch.ones(len(x), device=x.device) * u
        semantic, texture = (1 + DELTA) * us, (1 + DELTA) * us - DELTA
        rates = [torch.where((t >= 0) & (t < 1), 1 + DELTA, 0.0) for t in (texture, semantic)]
        times = torch.stack([texture.clamp(0, 1), semantic.clamp(0, 1)], 1)
        parts = COMPOSITE.unpack(velocity(x, times)).values()
        return torch.cat([rate[:, None] * part.flatten(1) for rate, part in zip(rates, parts, strict=True)], 1)

    return odeint(derivative, noise, torch.tensor([0.0, 1.0]).to(noise), rtol=rtol, atol=atol, method="dopri5")[-1]


def sampling_overhead(size: str, batch: int, repeats: int, device: torch.device) -> list[Row]:
    """Milliseconds outside of the network: dopri5 as published, and the default of `sfd sample`.

    Those of a whole sampling are of as many evaluations as each takes on models/shapes (`NFE`).
    """
    net = Inference(frozen(size, device))
    noise, labels = initial_noise(range(batch), COMPOSITE).to(device), class_labels(batch, device)
    ways: dict[str, Callable[[TimedVelocity], object]] = {
        "plain": lambda field: published_sampling(field, noise),
        "project": lambda field: integrate(field, noise, SCHEDULE, COMPOSITE, steps=DEFAULT_STEPS),
    }
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            turns[name].append(timed_sampling(way, TimedVelocity(net.velocity(labels)), device))
    best = {name: min(each, key=lambda turn: turn[1]) for name, each in turns.items()}
    what, plain = f"sampling {size}, batch {batch}", best["plain"][1]
    samplings = {"plain": plain * NFE["published"], "project": best["project"][1] * NFE["ours"]}
    return [
        _row(what, name, *best[name], plain)
        | {"sampling_milliseconds": 1e3 * samplings[name]}
        | {"of_the_plain_sampling": samplings[name] / samplings["plain"]}
        for name in ways
    ]


def timed_sampling(
    way: Callable[[TimedVelocity], object], field: TimedVelocity, device: torch.device
) -> tuple[float, float]:
    """Sample; give seconds per evaluation of the whole, and of what is outside of the network."""
    wait(device)
    start = time.perf_counter()
    way(field)
    wait(device)
    whole = time.perf_counter() - start
    evaluated = field.seconds if device.type == "cpu" else field.bare(device)
    return whole / field.calls, (whole - evaluated) / field.calls


def _row(what: str, way: str, whole: float, outside: float, plain: float) -> Row:
    row = {"what": what, "way": way, "milliseconds": 1e3 * whole, "outside_milliseconds": 1e3 * outside}
    return row | {"share_outside": outside / whole, "of_the_plain_paths": outside / plain}


def overhead(setting: Setting) -> list[Row]:
    """Time a step and an evaluation of each path, and what of it is spent outside of the network."""
    latents = find_latents(prepared(setting.out / "demo"))
    rows = sampling_overhead("tiny", 8, setting.repeats, setting.device)
    return rows + training_overhead(latents, setting.repeats, setting.out / "overhead", setting.device)
