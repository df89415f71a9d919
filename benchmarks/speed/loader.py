"""Batches alone: how many images a second are prepared, beside how many a training step takes."""

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
from sfd.schedules import build_schedule

from benchmarks.speed.demo import RECIPE, prepared
from benchmarks.speed.latents import task_like_published
from benchmarks.speed.measuring import Row, Setting, best_times
from sfd.data.folder import FolderSource
from sfd.encoders import autoencoder_kl
from sfd.models.dit import LightningDiT
from sfd.run.latents import find_latents
from sfd.run.pipeline import transformer_config
from sfd.run.recipe import load_recipe
from sfd.training.batches import Batches
from sfd.training.config import TrainSettings
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.tasks.texture import TextureObjective, TextureTask
from sfd.training.trainer import Task
from sfd.utils import rng

JPEGS, FILE_SIZE, IMAGE_SIZE = 256, (320, 288), 256
LATENTS = 64  # images of a batch of latents as published: a GPU's share of one
THREADS = (1, 2)


class Loaded(NamedTuple):
    """What is trained, and what its batches are read from."""

    what: str
    task: Task
    batch: int
    images: int  # in the data set
    files: tuple[Path, ...]  # (): from memory
    trained: int  # images of a training step: as many as its memory allows


def loader(setting: Setting) -> list[Row]:
    """Images a second of threads that prepare batches, and of training in bf16, which uses them up.

    Cold: of files that the system no longer holds in memory; what the disk itself remembers is not in its power. The
    share of a core is what a single thread spends on what training takes.
    """
    rows = []
    for each in _loaded(setting):
        step = _step(each.task, each.trained, setting.device)
        training = each.trained / best_times({"": step}, max(setting.repeats // 2, 1), setting.device)[""]
        for threads in THREADS:
            row: Row = {"what": each.what, "batch": each.batch, "threads": threads}
            row["cold"] = _cold(each, threads, setting.device)
            row["warm"] = max(_rate(each, threads, setting.device) for _ in range(max(setting.repeats, 2)))
            row |= {"training": training, "share_of_a_core": training / row["warm"] if threads == 1 else None}
            rows.append(row)
    return rows


def _loaded(setting: Setting) -> Iterator[Loaded]:
    size, batch = setting.sizes[0]
    recipe = load_recipe(RECIPE, [])
    latents = find_latents(prepared(setting.out / "demo"))
    config = transformer_config(recipe, latents)
    schedule = build_schedule(recipe.schedule, config.composite.names)
    many = recipe.train.batch_size
    demo = DiffusionTask(LightningDiT(config), latents, schedule, recipe.loss, seed=0, batch_size=many)
    yield Loaded("the demo's latents", demo, many, len(latents), tuple(latents.folder.glob("*.safetensors")), many)
    like = task_like_published(size, LATENTS, setting.out / "published")
    shards = tuple(like.latents.folder.glob("*.safetensors"))
    yield Loaded(f"latents and features as published, {size}", like, LATENTS, len(like.latents), shards, batch)
    folder = _jpegs(setting.out / "jpegs")
    for what, budget, files in (
        ("JPEGs, decoded at each step", 0, tuple(folder.iterdir())),
        ("JPEGs, decoded once", 1 << 30, ()),
    ):
        source = FolderSource(folder, IMAGE_SIZE, budget=budget)
        encoder = autoencoder_kl.build(autoencoder_kl.Config())
        texture = TextureTask(encoder, source, TextureObjective(), seed=0, batch_size=8)
        yield Loaded(f"{what}, texture encoder", texture, 8, len(source), files, 8)


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


def _forget(path: Path) -> None:
    """Have the system drop a file's pages, after bringing them to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cold(loaded: Loaded, threads: int, device: torch.device) -> float | None:
    """Images a second after the system has forgotten the files; None if there are none, or it cannot."""
    if not loaded.files or not hasattr(os, "posix_fadvise"):
        return None
    for path in loaded.files:
        _forget(path)
    return _rate(loaded, threads, device)


def _rate(loaded: Loaded, threads: int, device: torch.device) -> float:
    """Images a second over all batches of the data set."""
    steps = max(loaded.images // loaded.batch, 1)
    settings = TrainSettings(steps=steps, batch_size=loaded.batch, learning_rate=1e-5)
    with closing(Batches(loaded.task.batch, settings, threads=threads, pinned=device.type == "cuda")) as batches:
        start = time.perf_counter()
        batches.start(0, 0)
        for _ in range(steps):
            batches.next()
        return steps * loaded.batch / (time.perf_counter() - start)


def _step(task: Task, batch: int, device: torch.device) -> Callable[[], None]:
    """Make a training step on one batch, over and over."""
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
