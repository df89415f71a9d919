"""Batches alone: images per second that are prepared, against what a training step consumes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.demo import RECIPE, prepared, published_task
from benchmarks.measure import Row, Setting, best_times
from sfd.data.folder import FolderSource
from sfd.encoders import autoencoder_kl
from sfd.models.dit import LightningDiT
from sfd.run.latents import find_latents
from sfd.run.recipe import load_recipe
from sfd.run.transformer import transformer_config
from sfd.schedule import build_schedule
from sfd.training.config import TrainSettings
from sfd.training.data import Prefetcher
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.tasks.texture import TextureObjective, TextureTask
from sfd.training.trainer import TrainingTask
from sfd.utils import rng

JPEGS, FILE_SIZE, IMAGE_SIZE = 256, (320, 288), 256
LATENTS = 64  # images in a batch of latents as published: a GPU's share of one


class Case(NamedTuple):
    """What is trained, and what its batches are read from."""

    what: str
    task: TrainingTask
    batch: int
    images: int  # in the data set
    files: tuple[Path, ...]  # (): from memory
    trained: int  # images per training step


def loader(setting: Setting) -> Iterator[Row]:
    """Images per second of one and two threads that prepare batches, and of training in bf16, which consumes them.

    Cold: from files that the system no longer holds in memory, whatever the disk below remembers. The share of a core
    is what a single thread spends on what training consumes.
    """
    for case in _cases(setting):
        step = _step(case.task, case.trained, setting.device)
        training = case.trained / best_times({"": step}, max(setting.repeats // 2, 1), setting.device)[""]
        for threads in (1, 2):
            row: Row = {"what": case.what, "batch": case.batch, "threads": threads}
            row["cold"] = _cold(case, threads, setting.device)
            row["warm"] = max(_rate(case, threads, setting.device) for _ in range(max(setting.repeats, 2)))
            row |= {"training": training, "share_of_a_core": training / row["warm"] if threads == 1 else None}
            yield row


def _cases(setting: Setting) -> Iterator[Case]:
    size, batch = setting.sizes[0]
    if setting.device.type == "cpu" and not setting.quick:
        yield _demo(prepared(setting.out / "demo"))
    task = published_task(size, LATENTS, setting.out / "published")
    shards = tuple(task.latents.folder.glob("*.safetensors"))
    yield Case(f"latents and features as published, {size}", task, LATENTS, len(task.latents), shards, batch)
    folder = _jpegs(setting.out / "jpegs")
    for what, budget, files in (
        ("JPEGs, decoded at each step", 0, tuple(folder.iterdir())),
        ("JPEGs, decoded once", 1 << 30, ()),
    ):
        source = FolderSource(folder, IMAGE_SIZE, budget=budget)
        encoder = autoencoder_kl.build(autoencoder_kl.Config())
        texture = TextureTask(encoder, source, TextureObjective(), seed=0, batch_size=8)
        yield Case(f"{what}, texture encoder", texture, 8, len(source), files, 8)


def _demo(folder: Path) -> Case:
    recipe, latents = load_recipe(RECIPE, []), find_latents(folder)
    config = transformer_config(recipe, latents)
    schedule = build_schedule(recipe.schedule, config.composite.names)
    batch = recipe.train.batch_size
    task = DiffusionTask(LightningDiT(config), latents, schedule, recipe.loss, seed=0, batch_size=batch)
    return Case("the demo's latents", task, batch, len(latents), tuple(latents.folder.glob("*.safetensors")), batch)


def _jpegs(folder: Path) -> Path:
    """Write images with about the detail of photographs: smooth colours and some grain."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(JPEGS):
        path = folder / f"{k:04d}.jpg"
        if not path.exists():
            generator = rng.generator(k, "benchmark")
            colours = Image.fromarray(generator.integers(0, 256, (9, 10, 3), np.uint8))
            smooth = np.asarray(colours.resize(FILE_SIZE, Image.Resampling.BICUBIC), np.float32)
            grain = generator.standard_normal(smooth.shape[:2], dtype=np.float32)[..., None]
            Image.fromarray((smooth + 8 * grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def _cold(case: Case, threads: int, device: torch.device) -> float | None:
    """Images per second once the system has dropped the files' pages; None if there are none, or it cannot."""
    if not case.files or not hasattr(os, "posix_fadvise"):
        return None
    for path in case.files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _rate(case, threads, device)


def _rate(case: Case, threads: int, device: torch.device) -> float:
    """Images per second over all batches of the data set."""
    steps = max(case.images // case.batch, 1)
    settings = TrainSettings(steps=steps, batch_size=case.batch, learning_rate=1e-5)
    with closing(Prefetcher(case.task.batch, settings, threads=threads, pinned=device.type == "cuda")) as batches:
        start = time.perf_counter()
        batches.start(0)
        for _ in range(steps):
            batches.next()
        return steps * case.batch / (time.perf_counter() - start)


def _step(task: TrainingTask, batch: int, device: torch.device) -> Callable[[], None]:
    """A training step in bf16 on one batch, over and over."""
    network = task.model.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    held = {name: value.to(device) for name, value in task.batch(0, range(batch)).items()}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = task.loss(network, held)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
