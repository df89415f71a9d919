"""All streams on one clock, τ(u) = u: ordinary flow matching of the composite latent."""

from __future__ import annotations

from sfd.schedules._base import PiecewiseLinear, Schedule
from sfd.utils.config import Settings


class Config(Settings):
    """Nothing to set."""


def build(config: Config, streams: tuple[str, ...]) -> Schedule:
    """Build the schedule."""
    return PiecewiseLinear((0.0, 1.0), dict.fromkeys(streams, (0.0, 1.0)))
