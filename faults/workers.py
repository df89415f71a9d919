"""Training by two ranks, of which one dies or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from faults.commands import SECONDS, Failure
from faults.runs import Place, Scenario
from sfd.utils import files

# Timeout of a collective; an hour in a real run.
HANG_SECONDS = 30
LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
LAUNCHER += ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]


def loses(number: int) -> Callable[[Place], str]:
    """Send a signal to one of two workers while they train; the launcher starts both again."""

    def attempt(place: Place) -> str:
        out = place.before("train")
        script, output = place.folder / "train.py", place.folder / "launched.txt"
        script.write_text(_SCRIPT.format(seconds=HANG_SECONDS))
        command = [*LAUNCHER, script, *map(str, place.run("train", "train.steps=40"))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        with output.open("wb") as handle:
            process = subprocess.Popen(command, stdout=handle, stderr=handle, env=environment)
        try:
            _wait(lambda: list(out.glob("training/checkpoints/step-00000000[69]*")), process, start, output)
            chosen = str(place.number % 2)
            workers = psutil.Process(process.pid).children(recursive=True)
            next(worker for worker in workers if _rank(worker) == chosen).send_signal(number)
            hit = time.monotonic()
            _wait(lambda: process.poll() is not None, process, start, output)
        finally:
            for left in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                left.kill()
            process.kill()
            process.wait()
        text = output.read_text(errors="replace")
        if process.returncode or "resuming after step" not in text:
            raise Failure(f"the launcher ended with {process.returncode}: {text[-1500:]}")
        _check_equal(place)
        return f"“transformer: resuming after step …”, {time.monotonic() - hit:.0f} s from the loss to the run's end"

    return attempt


_SCRIPT = """
from datetime import timedelta
from sfd.utils import distributed
distributed.COLLECTIVE_TIMEOUT = timedelta(seconds={seconds})
from sfd.cli.main import main
main(prog_name="sfd")
"""


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def _wait(condition: Callable[[], object], process: subprocess.Popen[bytes], start: float, output: Path) -> None:
    while not condition():
        if process.poll() is not None or time.monotonic() - start > SECONDS:
            raise Failure(f"the launcher ended or hangs: {output.read_text(errors='replace')[-1500:]}")
        time.sleep(0.02)


def _check_equal(place: Place) -> None:
    """Compare with an uninterrupted run of one process: other sums, so not the same bytes."""
    found = files.read_tensors(place.out / "model" / "model.safetensors")
    whole = Place(place.folder / "whole", place.reference, place.random)
    whole.folder.mkdir()
    whole.before("train")
    whole.do(whole.run("train", "train.steps=40")).succeeded()
    expected = files.read_tensors(whole.out / "model" / "model.safetensors")
    worst = max(float((found[name] - t).norm() / t.norm().clamp(min=1e-9)) for name, t in expected.items())
    if worst > 1e-3:
        raise Failure(f"the weights differ by {worst:.1e} of their norm from a run that lost no worker")


SCENARIOS = [
    Scenario("one of two workers is killed (`torchrun`)", loses(signal.SIGKILL), 2),
    Scenario("one of two workers hangs (`torchrun`)", loses(signal.SIGSTOP), 2),
]
