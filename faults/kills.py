"""Commands that are killed or interrupted and then resumed, and two commands in one folder."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable

from faults.commands import Command
from faults.runs import Place, Scenario, check_same

# The first output of each stage, and about the seconds from then on, from which the moment of a signal is drawn.
WORK = {
    **{"train-texture": ("texture", 1.0), "train-semvae": ("compressor", 1.0), "prepare": ("latents", 0.8)},
    **{"train": ("training", 1.5), "report": ("samples", 2.0), "run": ("texture", 5.0)},
}
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def hit(command: Command, number: int, sign: Callable[[], object], seconds: float) -> None:
    """Send a signal a while after the first sign of work."""
    if command.until(sign):
        time.sleep(seconds)
        command.send(number)


def killed(stage: str) -> Callable[[Place], str]:
    """Kill a stage at a random moment."""

    def attempt(place: Place) -> str:
        work, (first, seconds) = place.run(stage), WORK[stage]
        seconds = place.random.uniform(0, seconds)
        while True:  # a command that ended before it could be killed does not count
            if stage != "run":
                place.before(stage)
            command = place.start(work)
            hit(command, signal.SIGKILL, (place.out / first).exists, seconds)
            if command.wait().ended(-signal.SIGKILL, 0).code:
                break
            shutil.rmtree(place.out)
            seconds /= 2
        ended = place.do(work).succeeded()
        for made in list(WORK) if stage == "run" else [stage]:
            if made != "run":
                place.check(made)
        return next((line for line in ended.output.splitlines() if "resuming" in line), "")

    return attempt


def killed_while_saving(place: Place) -> str:
    """Kill training while a checkpoint is being written."""
    work, folder = place.run("train"), place.before("train") / "training" / "checkpoints"
    command = place.start(work)
    wanted = place.random.randrange(1, 7)
    seen: set[str] = set()

    def writing() -> bool:
        seen.update(path.name for path in folder.glob(".step-*.partial"))
        return len(seen) >= wanted

    command.until(writing, 0.0002)
    time.sleep(place.random.uniform(0, 0.01))
    command.send(signal.SIGKILL)
    command.wait().ended(-signal.SIGKILL, 0)
    ended = place.do(work).succeeded()
    place.check("train")
    return next((line for line in ended.output.splitlines() if "resuming" in line), "")


def killed_sampling(place: Place) -> str:
    """Kill `sfd sample` after a random number of images."""
    work = ["sample", place.reference, "--seeds", "0-5", "--steps", 4, "batch_size=4", "--device", "cpu", "--out"]
    command = place.start([*work, place.out])
    wanted = place.random.randrange(0, 60)
    command.until(lambda: len(list(place.out.glob("0*.png"))) >= wanted)
    time.sleep(place.random.uniform(0, 0.02))
    command.send(signal.SIGKILL)
    command.wait().ended(-signal.SIGKILL, 0)
    place.do([*work, place.out]).succeeded()
    place.do([*work, place.folder / "whole" / "out"]).succeeded()
    check_same(place.out, place.folder / "whole" / "out")
    return ""


def asked_to_stop(number: int) -> Callable[[Place], str]:
    """Ask training to stop at a random moment."""

    def attempt(place: Place) -> str:
        work = place.run("train")
        log = place.before("train") / "training" / "log.jsonl"
        command = place.start(work)
        hit(command, number, log.exists, place.random.uniform(0, 0.5))
        ended = command.wait().ended(STOPS[signal.Signals(number)], 0)
        place.do(work).succeeded()
        place.check("train")
        return ended.message

    return attempt


def time_over(place: Place) -> str:
    """Give training too little time."""
    place.before("train")
    ended = place.do(place.run("train", "--max-hours", place.random.uniform(0.1, 1.2) / 3600)).ended(75, 0)
    place.do(place.run("train")).succeeded()
    place.check("train")
    return ended.message


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
    Scenario("SIGKILL while the transformer trains", killed("train"), 14, quick=True),
    Scenario("SIGKILL while a checkpoint is written", killed_while_saving, 12, quick=True),
    Scenario("SIGKILL while the texture encoder trains", killed("train-texture"), 4),
    Scenario("SIGKILL while the SemVAE trains", killed("train-semvae"), 4),
    Scenario("SIGKILL while latents are prepared", killed("prepare"), 10, quick=True),
    Scenario("SIGKILL in `sfd sample`", killed_sampling, 10, quick=True),
    Scenario("SIGKILL in sampling, evaluation and report", killed("report"), 8),
    Scenario("SIGKILL anywhere in `sfd run`", killed("run"), 4),
    Scenario("SIGINT (Ctrl-C) in training", asked_to_stop(signal.SIGINT), 4, quick=True),
    Scenario("SIGTERM in training", asked_to_stop(signal.SIGTERM), 4),
    Scenario("the time of `--max-hours` is over", time_over, 4),
    *(Scenario(f"two `sfd {s}` in one folder at once", twice(s), 2) for s in ("train", "prepare", "report")),
]
