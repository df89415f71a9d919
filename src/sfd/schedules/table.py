"""Any monotone table of points a stream, joined by straight lines; a schedule learned elsewhere comes in this way."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from pydantic import Field

from sfd.schedules._base import PiecewiseLinear, Schedule
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError, unknown

SPACING = 1e-9  # points closer than this in base time would be a jump


class Config(Settings):
    """The table."""

    points: dict[str, tuple[tuple[float, float], ...]] = Field(
        description="per stream, pairs (base time, stream time), both ascending from 0 to 1"
    )


def build(config: Config, streams: tuple[str, ...]) -> Schedule:
    """Build the schedule from every stream's points; each stream may have its own number of them.

    Raises:
        SFDError: a stream without points, points of no stream, or points that do not ascend from (0, 0) to (1, 1).
    """
    for name in config.points:
        if name not in streams:
            raise unknown("stream", name, streams)
    for name in streams:
        if name not in config.points:
            raise SFDError(f"a table needs points for every stream, but stream {name!r} has none; add them")
        _check_points(name, config.points[name])
    merged = sorted({u for points in config.points.values() for u, _ in points})
    # Two streams' points that all but coincide are one: a sliver between them would only cost solver steps.
    base = [0.0, *(b for a, b in pairwise(merged) if b - a >= SPACING and b < 1), 1.0]
    times = {}
    for name in streams:
        u, time = np.array(config.points[name]).T
        # Rounding in the interpolation must not make a flat stream fall.
        times[name] = np.maximum.accumulate(np.interp(base, u, time)).clip(0, 1).tolist()
    return PiecewiseLinear(base, times)


def _check_points(name: str, points: tuple[tuple[float, float], ...]) -> None:
    if len(points) < 2 or points[0] != (0, 0) or points[-1] != (1, 1):
        raise SFDError(f"the points of stream {name!r} must begin at (0, 0) and end at (1, 1), got {list(points)}")
    for (u, time), (next_u, next_time) in pairwise(points):
        if not next_u - u >= SPACING:
            raise SFDError(f"stream {name!r}: base times must ascend by {SPACING} or more, got {u} then {next_u}")
        if not next_time >= time:
            raise SFDError(f"stream {name!r}: times must not fall, got {time} then {next_time} at base time {next_u}")
