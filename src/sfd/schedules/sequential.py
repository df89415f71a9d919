"""One after the other: leaders go from noise to data, then followers do. The offset schedule at Δ = 1."""

from __future__ import annotations

from pydantic import Field

from sfd.schedules import offset
from sfd.schedules._base import Schedule
from sfd.utils.config import Settings


class Config(Settings):
    """Who goes first."""

    leaders: tuple[str, ...] = Field(("semantic",), description="streams that go first; all others follow")


def build(config: Config, streams: tuple[str, ...]) -> Schedule:
    """Build the schedule; errors as for `offset.build`."""
    return offset.build(offset.Config(delta=1.0, leaders=config.leaders), streams)
