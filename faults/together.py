"""Two commands in one folder at once."""

from __future__ import annotations

from collections.abc import Callable

from faults.runs import Place
from faults.scenarios import Scenario


def twice(stage: str) -> Callable[[Place], str]:
    """Start the same command twice at the same time: one does the work, the other is refused."""

    def attempt(place: Place) -> str:
        place.before(stage)
        commands = [place.start(place.run(stage)) for _ in range(2)]
        ends = sorted((command.wait() for command in commands), key=lambda ended: ended.code)
        ends[0].succeeded()
        if ends[1].code:
            ends[1].refused("in use by another run")
        place.check(stage)
        return ends[1].message

    return attempt


SCENARIOS = [
    Scenario(f"two `sfd {stage}` in one folder at once", twice(stage), 2) for stage in ("train", "prepare", "report")
]
