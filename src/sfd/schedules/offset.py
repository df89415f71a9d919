"""The method's schedule: some streams lead, the others follow Δ behind (Pan et al. 2025, arXiv 2512.04926).

    leaders    τ(u) = min(1, (1 + Δ)·u)
    followers  τ(u) = max(0, (1 + Δ)·u − Δ)

So leaders move alone, then all move, then followers move alone. Beyond Δ = 1 leaders arrive before followers set out.
"""

from __future__ import annotations

from pydantic import Field

from sfd.schedules._base import PiecewiseLinear, Schedule
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError, unknown


class Config(Settings):
    """How far ahead the leaders run."""

    delta: float = Field(0.3, ge=0, le=1e6, description="Δ; 0 is synchronous, 1 is one after the other")
    leaders: tuple[str, ...] = Field(("semantic",), description="streams that run ahead; all others follow")


def build(config: Config, streams: tuple[str, ...]) -> Schedule:
    """Build the schedule.

    Raises:
        SFDError: a leader is not among the streams, or no stream leads, or none follows.
    """
    for name in config.leaders:
        if name not in streams:
            raise unknown("leading stream", name, streams)
    if not 0 < len(set(config.leaders)) < len(streams):
        raise SFDError(
            f"an offset needs streams that lead and streams that follow, but of {', '.join(streams)} the leaders are "
            f"{', '.join(config.leaders) or 'none'}; name some, or use the schedule 'synchronous'"
        )
    delta = config.delta
    depart, arrive = delta / (1 + delta), 1 / (1 + delta)  # followers leave 0; leaders reach 1
    # Written out at each point, because (1 + Δ)·u − Δ in floating point misses 0 and 1 by a little.
    lead = {0.0: 0.0, depart: min(1.0, delta), arrive: 1.0, 1.0: 1.0}
    follow = {0.0: 0.0, arrive: max(0.0, 1 - delta), depart: 0.0, 1.0: 1.0}
    base = sorted(lead)
    tables = {name: lead if name in config.leaders else follow for name in streams}
    return PiecewiseLinear(base, {name: [table[u] for u in base] for name, table in tables.items()})
