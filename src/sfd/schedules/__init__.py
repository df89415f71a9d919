"""Schedules: base time u → each stream's time and rate.

A new file here is a new schedule (docs/extending-schedules.md). Each module holds `Config`, a `Settings` record, and
`build(config, streams)`, which returns a `Schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfd.schedules._base import PiecewiseLinear, Schedule, StreamTimes, check
from sfd.utils import registry
from sfd.utils.config import parse
from sfd.utils.errors import SFDError

__all__ = ["PiecewiseLinear", "Schedule", "StreamTimes", "build_schedule", "check"]


def build_schedule(spec: Mapping[str, Any], streams: Sequence[str]) -> Schedule:
    """Build a schedule from plain values, as a recipe or a saved model gives them.

    Args:
        spec: {"name": "offset", "delta": 0.3}: which schedule, then its settings.
        streams: names of the streams it drives, in packed order.

    Returns:
        the schedule, verified; its `spec` holds all settings, defaults too, and builds an equal one.

    Raises:
        SFDError: no such schedule, field or stream; or the map is not monotone from 0 to 1.
    """
    settings = dict(spec)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise SFDError(f"a schedule needs a name ({', '.join(registry.names(__name__))}), but {dict(spec)} was given")
    label = f"schedule {name!r}"
    module = registry.find(__name__, name, "schedule")
    config = parse(module.Config, settings, label)
    schedule: Schedule = module.build(config, tuple(streams))
    check(schedule, label)
    schedule.spec = {"name": name, **config.model_dump(mode="json")}
    return schedule
