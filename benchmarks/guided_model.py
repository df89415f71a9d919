"""Guided integration of a trained model's latents, also blind to what `sfd sample` always stops at: to compare."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sfd.generation.generate import SamplingConfig, velocity_field
from torch import Tensor

from sfd.generation.model import TEXTURE_STREAM, Model
from sfd.guidance import Guided, guide
from sfd.sampling import initial_noise, integrate


class Solved(NamedTuple):
    """Latents, and what they took."""

    latents: Tensor  # (B, N) packed
    evaluations: int  # of the strong model
    weak_evaluations: int


def solve(
    model: Model, count: int, how: SamplingConfig, *, first: int = 0, knots: bool = True, jumps: bool = True
) -> Solved:
    """Integrate seeds `first`, …, each of the class that is its turn, as one batch; the null class is the weak model.

    Args:
        model: a model with classes.
        count: of images.
        how: solver, steps and guidance.
        first: seed of the first image.
        knots: whether to stop at knots; False integrates [0, 1] as one piece, as the published sampler does.
        jumps: whether to stop where a guidance interval ends; False compares times with it at each evaluation.
    """
    network = model.inference("float32", False)
    labels = torch.arange(first, first + count, device=model.device) % len(model.classes)
    null = torch.full_like(labels, model.transformer.null_class)
    guided = guide(
        velocity_field(network, labels),
        velocity_field(network, null),
        how.guidance,
        model.composite,
        how.interval,
        weak_every=how.weak_every,
        weak_between=how.weak_between,
    )
    seeds = range(first, first + count)
    result = integrate(
        guided if jumps else lambda x, times: guided(x, times),
        initial_noise(seeds, model.composite).to(model.device),
        model.schedule,
        model.composite,
        solver=how.solver,
        steps=how.resolved_steps,
        options=how.options,
        budget=how.budget,
        seeds=seeds,
        knots=knots,
    )
    return Solved(result.x.cpu(), result.evaluations, guided.weak_evaluations if isinstance(guided, Guided) else 0)


def texture_errors(model: Model, x: Tensor, reference: Tensor) -> Tensor:
    """Relative error of each image's texture: (B,)."""
    ours, theirs = (model.composite.unpack(t)[TEXTURE_STREAM].flatten(1) for t in (x, reference))
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
