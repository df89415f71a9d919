"""A model's schedule as data to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sfd.generation.model import Model
from sfd.schedule import Schedule

POINTS = 201


@dataclass(frozen=True)
class ScheduleCurves:
    """The schedule on a fine grid of base times; streams in the order of `names`."""

    names: Sequence[str]
    base: np.ndarray  # (n,) ascending from 0 to 1
    times: np.ndarray  # (n, K)
    rates: np.ndarray  # (n, K)
    knots: Sequence[float]  # base times within (0, 1) at which a rate jumps


def schedule_curves(model: Model, schedule: Schedule | None = None) -> ScheduleCurves:
    """Tabulate a model's schedule, or another one, for drawing, knots included so that corners stay sharp."""
    schedule = schedule or model.schedule
    base = np.union1d(np.linspace(0, 1, POINTS), schedule.knots)
    times, rates = schedule.at(torch.from_numpy(base))
    return ScheduleCurves(model.composite.names, base, times.numpy(), rates.numpy(), schedule.knots)
