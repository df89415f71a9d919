"""Training as two processes, of which one dies or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from faults.commands import Failure
from faults.runs import Place
from faults.scenarios import Scenario
from sfd.utils import files

# What a process waits for another in a collective operation before it takes it for lost; an hour in a real run.
HANG_SECONDS = 15
SECONDS = 240
LAUNCHER = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--max-restarts",
    "3",
)


def loses(number: int) -> Callable[[Place], str]:
    """Send a signal to one of two workers while they train; the launcher starts both again."""

    def attempt(place: Place) -> str:
        out = place.before("train")
        customized = place.folder / "sitecustomize.py"
        customized.write_text(_SHORTER.format(seconds=HANG_SECONDS))
        output = place.folder / "launched.txt"
        command = [*LAUNCHER, "-m", "sfd", *map(str, place.run("train", "train.steps=40"))]
        start = time.monotonic()
        with output.open("wb") as handle:
            process = subprocess.Popen(command, stdout=handle, stderr=handle, env=_environment(place.folder))
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


_SHORTER = """
import importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "sfd.utils.distributed":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.COLLECTIVE_TIMEOUT = module.timedelta(seconds={seconds})
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}


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
