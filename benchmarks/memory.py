"""Working memory of sampling and training (`measure.working_memory`).

Weights come on top of it; for training also the optimizer's moments and the EMA, while gradients are part of it.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.measure import COMPOSITE, Checkpointing, Row, Setting, best_times, class_labels, network, working_memory
from benchmarks.sampling import velocities
from benchmarks.training import TrainingStep, ways
from sfd.run.estimate import kept_bytes
from sfd.sampling import initial_noise

KINDS: dict[str, Checkpointing] = {"none": False, "selective": "selective", "all": True}


def memory(setting: Setting) -> list[Row]:
    """Working memory of one evaluation in sampling, and of one training step."""
    device, rows = setting.device, []
    for size, batch in setting.sizes:
        net = network(size).eval().requires_grad_(False).to(device)
        times = torch.full((2,), 0.5, device=device)
        noise = initial_noise(range(batch), COMPOSITE).to(device)
        fields = velocities(net, class_labels(batch, device), setting)
        for name in ways(setting):
            call = partial(fields[name], noise, times)
            call()  # compiles
            rows.append(_row("sampling", size, batch, name) | {"working_bytes": working_memory(call, device)})
        del fields, call
        net.to("cpu").requires_grad_(True)
        for name in ways(setting):
            step = TrainingStep(net, batch, device, name)
            step()
            rows.append(_row("training", size, batch, name) | {"working_bytes": working_memory(step, device)})
            del step  # on a GPU, two of the largest would be too many
        torch._dynamo.reset()
    return rows


def _row(task: str, size: str, batch: int, way: str) -> Row:
    return {"task": task, "size": size, "batch": batch, "way": way}


def checkpointing(setting: Setting) -> list[Row]:
    """Time and working memory of training steps by what of a block is kept for the backward pass.

    Bytes per image are measured as what a batch takes more than half of it; counted are those of `sfd.run.estimate`.
    """
    device, rows = setting.device, []
    for size, batch in setting.sizes:
        nets = {name: network(size, kind) for name, kind in KINDS.items()}
        for precision in ("float32", "bf16"):
            # On a GPU one after the other: three trainings of the largest size are more than its memory holds.
            groups = [[name] for name in nets] if device.type == "cuda" else [list(nets)]
            plain = 0.0
            for group in groups:
                steps = {name: TrainingStep(nets[name], batch, device, precision) for name in group}
                times = best_times(steps, max(setting.repeats // 2, 1), device)
                for name in group:
                    step, rate = steps.pop(name), batch / times[name]
                    plain = plain or rate  # the first recomputes nothing
                    row = {"size": size, "batch": batch, "precision": precision, "recomputed": name}
                    row |= {"images_per_second": rate, "ratio": rate / plain, **_per_image(step, batch)}
                    rows.append(row | {"counted_bytes_per_image": kept_bytes(nets[name].config, precision)})
                    del step
    return rows


def _per_image(step: TrainingStep, batch: int) -> Row:
    """Working memory of a step, and what each image of half of the batch adds to it; at least two images."""
    whole = working_memory(step, step.device)
    step.cut(batch // 2)
    half = working_memory(step, step.device)
    each = None if whole is None or half is None else (whole - half) / (batch - batch // 2)
    return {"working_bytes": whole, "bytes_per_image": each}
