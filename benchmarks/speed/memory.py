"""Memory of sampling and training: by size, batch and way, with blocks checkpointed, with gradients accumulated.

All of it is working memory, see `measuring.working_memory`: for sampling weights come on top of it, for training
weights, the optimizer's moments and the average; gradients are part of it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.speed.latents import task_like_published
from benchmarks.speed.measuring import (
    COMPOSITE,
    Checkpointing,
    Row,
    Setting,
    best_times,
    class_labels,
    network,
    working_memory,
)
from benchmarks.speed.sampling import inferences
from benchmarks.speed.training import Training
from sfd.data.shards import FEATURES
from sfd.models.inference import cannot_compile
from sfd.run.estimate import kept_bytes
from sfd.sampling import initial_noise
from sfd.training.config import TrainSettings
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.trainer import Run

MORE = 8  # times the batch: as many again are sampled at once
KINDS: dict[str, Checkpointing] = {"none": False, "selective": "selective", "all": True}


def memory(setting: Setting) -> list[Row]:
    """Working memory of one evaluation in sampling, and of one training step."""
    device, rows = setting.device, []
    for size, batch in setting.sizes:
        made = network(size).eval().requires_grad_(False).to(device)
        times = torch.full((2,), 0.5, device=device)
        for name, way in inferences(made, device).items():
            for count in (batch, MORE * batch):
                noise, labels = initial_noise(range(count), COMPOSITE).to(device), class_labels(count, device)
                call = partial(way, noise, times, labels)
                if count == batch:
                    call()  # compiles
                rows.append(_row("sampling", size, count, name) | {"working_bytes": working_memory(call, device)})
        del way, call
        made.to("cpu").requires_grad_(True)
        for name in ("float32", "bf16", *(["bf16 compiled"] if cannot_compile(device) is None else [])):
            # Another batch would be compiled anew, which takes minutes.
            for count in (batch,) if name.endswith("compiled") else (max(batch // 4, 1), batch):
                step = Training(made, count, device, name)
                step()
                rows.append(_row("training", size, count, name) | {"working_bytes": working_memory(step, device)})
                del step  # on a GPU, two of the largest would be too many
        torch._dynamo.reset()
    return rows


def _row(task: str, size: str, batch: int, way: str) -> Row:
    return {"task": task, "size": size, "batch": batch, "way": way}


def checkpointing(setting: Setting) -> list[Row]:
    """Time and working memory of training steps by what of a block is kept for the backward pass.

    Bytes an image are measured as what a batch takes more than half of it; counted are those of `sfd.run.estimate`.
    """
    device, rows = setting.device, []
    for size, batch in setting.sizes:
        made = {name: network(size, kind) for name, kind in KINDS.items()}
        for precision in ("float32", "bf16"):
            # On a GPU one after the other: three trainings of the largest size are more than its memory holds.
            together = [[name] for name in made] if device.type == "cuda" else [list(made)]
            plain = 0.0
            for names in together:
                steps = {name: Training(made[name], batch, device, precision) for name in names}
                times = best_times(steps, max(setting.repeats // 2, 1), device)
                for name in names:
                    step, rate = steps.pop(name), batch / times[name]
                    plain = plain or rate  # the first recomputes nothing
                    row = {"size": size, "batch": batch, "precision": precision, "recomputed": name}
                    row |= {"images_per_second": rate, "ratio": rate / plain, **_of_an_image(step, batch)}
                    rows.append(row | {"counted_bytes_an_image": kept_bytes(made[name].config, precision)})
                    del step
    return rows


def _of_an_image(step: Training, batch: int) -> Row:
    """Working memory of a step, and what each image of half of the batch adds to it; at least two images."""
    whole = working_memory(step, step.device)
    step.cut(batch // 2)
    part = working_memory(step, step.device)
    each = None if whole is None or part is None else (whole - part) / (batch - batch // 2)
    return {"working_bytes": whole, "bytes_an_image": each}


def accumulation(setting: Setting) -> list[Row]:
    """Working memory of a step of the training loop, its batches included, by how many are accumulated."""
    size, batch = setting.sizes[0]
    rows = []
    for precision in ("float32", "bf16"):
        for accumulate, whole in ((1, batch), (4, 4 * batch), (1, 4 * batch)):
            task = task_like_published(size, whole, setting.out / "published")
            settings = TrainSettings(
                steps=9, batch_size=whole, accumulate=accumulate, learning_rate=1e-5, ema=0.9999, precision=precision
            )
            row = {"size": size, "precision": precision, "batch": whole, "accumulate": accumulate}
            rows.append(row | {"working_bytes": _step_memory(task, settings, setting)})
    return rows


def _step_memory(task: DiffusionTask, settings: TrainSettings, setting: Setting) -> int | None:
    """Working memory of a step after the first."""
    for name in (*task.composite.names, FEATURES):  # pages of the file that are mapped later would count
        for flipped in (False, True):
            task.latents.read(name, np.arange(len(task.latents)), np.full(len(task.latents), flipped))
    with TemporaryDirectory(dir=setting.out) as folder:
        run = Run(task, settings, Path(folder), setting.device)
        with run.closing():
            run.begin()
            run.advance()
            run.writer.wait()  # the first checkpoint
            used = working_memory(run.advance, setting.device)
            run.batches.close()
    return used
