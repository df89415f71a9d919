"""Flow matching: the straight path between noise and data, its velocity, and the three losses.

Pure functions of tensors. Time 0 is noise, 1 is data; x1 is data, x0 noise, u the base time, t a stream's own time.
Every loss is given per sample; `training.tasks.diffusion.DiffusionTask.loss` averages and adds them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BaseTime = Literal["logit_normal", "uniform"]


def sample_base_time(normals: Tensor, distribution: BaseTime = "logit_normal") -> Tensor:
    """Turn standard normals into base times u in [0, 1].

    Args:
        normals: any shape; one number gives one time, whatever the distribution.
        distribution: "logit_normal" (logit u ~ N(0, 1), as in Esser et al. 2024) or "uniform".
    """
    if distribution == "logit_normal":
        return torch.sigmoid(normals)
    if distribution == "uniform":
        return torch.special.ndtr(normals)  # the normal distribution function makes normals uniform
    raise ValueError(f"base time distribution must be 'logit_normal' or 'uniform', got {distribution!r}")


def density_ratio(t: Tensor, u: Tensor, distribution: BaseTime = "logit_normal") -> Tensor:
    """p(t) / p(u), with p the density of base times; 0 where t is 0 or 1 and p vanishes there.

    A stream's loss at u, drawn from p, times p(t)/p(u) · dt/du is its loss at t, drawn from p: a change of variables.

    Args:
        t: stream times in [0, 1].
        u: base times in (0, 1), broadcast against `t`.
        distribution: see `sample_base_time`.
    """
    if distribution == "uniform":
        return torch.ones_like(t)

    def log_density(time: Tensor) -> Tensor:
        return -time.logit().square() / 2 - (time * (1 - time)).log()

    inside = (t > 0) & (t < 1)
    return torch.where(inside, (log_density(t.where(inside, 0.5)) - log_density(u)).exp(), 0.0)


def interpolate(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """x(t) = t·x1 + (1 − t)·x0; `t` broadcasts against the latents."""
    return t * x1 + (1 - t) * x0


def velocity_target(x1: Tensor, x0: Tensor) -> Tensor:
    """v = x1 − x0, the derivative of `interpolate` with respect to t."""
    return x1 - x0


def velocity_loss(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over all entries of w·(v̂ − v)², per sample.

    Args:
        prediction: v̂ (B, N).
        target: v (B, N).
        weights: w (N,) or (B, N), the weight of the stream that each entry belongs to.

    Returns:
        (B,), in float32.
    """
    return (weights * (prediction.float() - target.float()).square()).mean(dim=1)


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of 1 − cos(v̂, v), the angle taken over all channels at a position.

    Args:
        prediction: v̂ (B, C, P), channels of the whole composite at P positions.
        target: v (B, C, P).

    Returns:
        (B,), in float32, each in [0, 2].
    """
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=1).mean(dim=1)


def repa_loss(projection: Tensor, features: Tensor) -> Tensor:
    """Mean over tokens of 1 − cos(projection, clean encoder features) (REPA, Yu et al. 2024, eq. 8).

    Args:
        projection: (B, T, C), the network's tokens after its projector, row by row.
        features: (B, C, h, w) with h·w = T.

    Returns:
        (B,), in float32, each in [0, 2].
    """
    flat = features.flatten(2)
    if flat.mT.shape != projection.shape:
        raise ValueError(
            f"features {tuple(features.shape)} do not fit projected tokens {tuple(projection.shape)}; "
            "expected (B, C, h, w) with h·w tokens of C channels"
        )
    return cosine_loss(projection.mT, flat)
