"""The phases of sampling, as data to draw: the schedule on a grid, and one sample from noise to image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.latents import TEXTURE
from sfd.schedule import Schedule
from sfd.utils.errors import SFDError

FRAMES = 13
STEPS = 48
CURVE_POINTS = 201


@dataclass(frozen=True)
class ScheduleCurves:
    """The schedule on a fine grid of base times; streams in the order of `names`."""

    names: Sequence[str]
    base: np.ndarray  # (n,) ascending from 0 to 1
    times: np.ndarray  # (n, K)
    rates: np.ndarray  # (n, K)
    knots: Sequence[float]  # base times within (0, 1) at which a rate jumps


@dataclass(frozen=True)
class Trajectory:
    """One sample from noise to image, at n base times."""

    caption: str
    base: np.ndarray  # (n,) ascending
    times: np.ndarray  # (n, K), streams in the order of the schedule's names
    semantic: np.ndarray  # (n, C, h, w) latents
    decoded: np.ndarray  # uint8 (n, H, W, 3), the texture latents decoded


def schedule_curves(model: Model, schedule: Schedule | None = None) -> ScheduleCurves:
    """Tabulate a model's schedule, or another one, for drawing, knots included so that corners stay sharp."""
    schedule = schedule or model.schedule
    base = np.union1d(np.linspace(0, 1, CURVE_POINTS), schedule.knots)
    times, rates = schedule.at(torch.from_numpy(base))
    return ScheduleCurves(model.composite.names, base, times.numpy(), rates.numpy(), schedule.knots)


def follow_sample(
    model: Model, config: SamplingConfig, seed: int, label: int | None = None, guiding: Model | None = None
) -> Trajectory:
    """Follow one sample from noise to image, at evenly spaced base times, by 48 steps of Heun's method."""
    if len(model.composite.streams) < 2:
        raise SFDError("this model has a single stream, so there are no phases to show; use a model with two")
    config = config.model_copy(update={"solver": "heun", "steps": STEPS, "options": {}, "shift": 1.0})
    if finest := model.transformer.config.flow_map:
        config, guiding = model.config(steps=len(finest) - 1), None
    classes = (label or 0) if model.classes else None
    states = model.trajectory(classes, seed, guiding=guiding, **config.model_dump(mode="json"))
    wanted = np.linspace(0, 1, FRAMES + 1)[1:]
    frames = [min(states, key=lambda p: abs(p.u - u)) for u in wanted]
    x = torch.cat([frame.x for frame in frames])
    semantic = next(name for name in model.composite.names if name != TEXTURE)
    named = f"class {model.classes[label or 0]!r}, " if model.classes else ""
    return Trajectory(
        caption=f"{named}seed {seed}, {config.summary()}",
        base=np.array([frame.u for frame in frames]),
        times=torch.stack([frame.t for frame in frames]).numpy(),
        semantic=model.composite.unpack(x.cpu())[semantic].numpy(),
        decoded=model.decode(x),
    )
