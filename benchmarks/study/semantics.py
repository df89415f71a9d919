"""What limits an arm: its texture on the semantics of real images, and the classes that its own semantics say.

Samples whose semantics are those of real images show what texture could be if semantics were generated without error.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.study.probe import Linear
from sfd.data.shards import LatentSet
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.guidance import VelocityField
from sfd.latents import SEMANTIC, CompositeLatent
from sfd.sampling import initial_noise, integrate


def chosen(latents: LatentSet, labels: Sequence[int]) -> np.ndarray:
    """Numbers of different training images with these labels."""
    left = {label: iter(np.flatnonzero(latents.labels.numpy() == label)) for label in set(labels)}
    return np.array([next(left[label]) for label in labels])


def read(latents: LatentSet, indices: np.ndarray) -> Tensor:
    """Normalised semantic latents (B, C, g, g) of images."""
    raw = latents.read(SEMANTIC, indices, np.zeros(len(indices), bool))
    mean, deviation = latents.composite()[SEMANTIC].statistics(raw)
    return (raw - mean) / deviation


def on_true_semantics(
    model: Model, true: Tensor, labels: Sequence[int], seeds: Sequence[int], config: SamplingConfig
) -> Tensor:
    """Sample latents (B, N) while semantics go straight from their noise to given ones (B, C, g, g), as in training."""
    composite, size, found = model.composite, config.batch_size, []
    for first in range(0, len(labels), size):
        part = slice(first, first + size)
        noise = initial_noise(seeds[part], composite).to(model.device)
        target = true[part].to(model.device).flatten(1) - noise.split(composite.sizes, 1)[composite.index(SEMANTIC)]
        velocity = model.velocity_field(torch.tensor(labels[part], device=model.device), config)
        straight = partial(_replaced, velocity, target, composite)
        found.append(integrate(straight, noise, model.schedule, composite, **config.integration).x)
    return torch.cat(found)


def _replaced(velocity: VelocityField, target: Tensor, composite: CompositeLatent, x: Tensor, t: Tensor) -> Tensor:
    """A velocity whose semantic part is given, (B, M)."""
    parts = list(velocity(x, t).split(composite.sizes, 1))
    parts[composite.index(SEMANTIC)] = target
    return torch.cat(parts, 1)


def class_accuracy(latents: LatentSet, generated: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Share of semantics whose class a linear probe reads rightly: generated ones (B, C, g, g), and as many real ones.

    The probe is trained on the semantics of other images.
    """
    numbers = chosen(latents, labels)
    others = np.setdiff1d(np.arange(len(latents)), numbers)
    probe = Linear(read(latents, others).flatten(1).numpy(), latents.labels[torch.from_numpy(others)].numpy())
    parts = {"generated": generated, "real": read(latents, numbers)}
    found = {name: probe(part.flatten(1).numpy()).argmax(axis=1) for name, part in parts.items()}
    return {name: float((classes == np.asarray(labels)).mean()) for name, classes in found.items()}
