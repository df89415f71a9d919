"""The phases of sampling, as data to draw: the schedule on a grid, and one sample on its way from noise to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sfd.generation.generate import SamplingConfig, decode, generate
from sfd.generation.model import TEXTURE_STREAM, Model
from sfd.sampling import Progress
from sfd.utils.errors import SFDError

STRIP_FRAMES = 13
STRIP_STEPS = 48
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
class Strip:
    """One sample on its way from noise to image, at n base times."""

    caption: str
    base: np.ndarray  # (n,) ascending
    times: np.ndarray  # (n, K), streams in the order of the schedule's names
    semantic: np.ndarray  # (n, C, h, w) latents
    decoded: np.ndarray  # uint8 (n, H, W, 3), the texture latents decoded


def class_labels(model: Model) -> list[int]:
    """Give all labels that can be asked for: the classes, or the null class of a model that has none."""
    return list(range(len(model.classes))) or [model.transformer.null_class]


def sampling_text(settings: SamplingConfig) -> str:
    """Say in a few words how images were sampled."""
    steps = f"{settings.resolved_steps} steps" if settings.resolved_steps else "adaptive steps"
    return f"{settings.solver}, {steps}, guidance {settings.guidance}"


def schedule_curves(model: Model) -> ScheduleCurves:
    """Tabulate a model's schedule for drawing, knots included so that corners stay sharp."""
    base = np.union1d(np.linspace(0, 1, CURVE_POINTS), model.schedule.knots)
    times, rates = model.schedule.at(torch.from_numpy(base))
    return ScheduleCurves(model.composite.names, base, times.numpy(), rates.numpy(), model.schedule.knots)


def phase_strip(
    model: Model, settings: SamplingConfig, seed: int, label: int | None = None, weak: Model | None = None
) -> Strip:
    """Follow one sample from noise to image, at evenly spaced base times."""
    if len(model.composite.streams) < 2:
        raise SFDError("this model has a single stream, so there are no phases to show; use a model with two")
    chosen = class_labels(model)[0] if label is None else label
    seen: list[Progress] = []
    fixed = settings.model_copy(update={"solver": "heun", "steps": STRIP_STEPS, "options": {}, "shift": 1.0})
    list(generate(model, [chosen], [seed], fixed, weak=weak, callback=seen.append))
    wanted = np.linspace(0, 1, STRIP_FRAMES + 1)[1:]
    frames = [min(seen, key=lambda p: abs(p.u - u)) for u in wanted]
    states = torch.cat([frame.x for frame in frames])
    latents = model.composite.unpack(states.cpu())
    leader = next(name for name in model.composite.names if name != TEXTURE_STREAM)
    named = f"class {model.classes[chosen]!r}, " if model.classes else ""
    return Strip(
        caption=f"{named}seed {seed}, {sampling_text(fixed)}",
        base=np.array([frame.u for frame in frames]),
        times=torch.stack([frame.times for frame in frames]).numpy(),
        semantic=latents[leader].numpy(),
        decoded=decode(model, states),
    )
