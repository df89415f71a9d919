"""Two runs at once, and clocks that jump."""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Callable

from faults.commands import Failure
from faults.runs import Place
from faults.scenarios import Scenario
from sfd.utils import files

DAY = 86400.0


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


def jump(seconds: float, after: float = 0.0) -> Callable[[], None]:
    """Make a process see another time of day, from a while after its start on."""
    begun, true = time.monotonic(), time.time

    def seen() -> float:
        return true() + (seconds if time.monotonic() - begun >= after else 0.0)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls.fromtimestamp(seen(), tz)

    def set_clock() -> None:
        time.time = seen
        files.datetime = Clock  # type: ignore[misc]

    return set_clock


def back_between(place: Place) -> str:
    """Train with a clock that is a day ahead, kill that, and go on with the right one."""
    out = place.before("train")
    command = place.start(place.run("train"), jump(DAY))
    if command.until(lambda: list(out.glob("training/checkpoints/step-00000000[369]*"))):
        command.send(signal.SIGKILL)
    command.wait().ended(-signal.SIGKILL)
    for path in out.rglob("*"):
        os.utime(path, (time.time() + DAY,) * 2)
    ended = place.do(place.run("train")).succeeded()
    place.check("train")
    return next(line for line in ended.output.splitlines() if "resuming" in line)


def back_within(place: Place) -> str:
    """Let the clock jump back a day while a run with a time limit trains."""
    place.before("train")
    place.do(place.run("train", "--max-hours", 1), jump(-DAY, place.random.uniform(0, 0.5))).succeeded()
    place.check("train")
    if files.read_json(place.out / "training" / "stage.json", "stage")["seconds"] < 0:
        raise Failure("a stage that took less than no time")
    return "(nothing)"


SCENARIOS = [
    *(
        Scenario(f"two `sfd {stage}` in one folder at once", twice(stage), 2)
        for stage in ("train", "prepare", "report")
    ),
    Scenario("a clock that jumps back a day between two attempts", back_between, 3),
    Scenario("a clock that jumps back a day while training", back_within, 3),
]
