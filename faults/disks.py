"""Disks that fill, and folders that cannot be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from faults.commands import Failure
from faults.runs import Place, Scenario, contents

NOBODY = 65534
FIRST = {
    "train": "training/log.jsonl",
    "prepare": "latents/shard-00000.safetensors",
    "report": "samples/guided/samples.json",
}


@contextmanager
def disk(folder: Path, size: str = "64m") -> Iterator[Path]:
    """Mount a small disk of memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """Fill a disk but for some bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as handle, suppress(OSError):
        while (free := shutil.disk_usage(folder).free) > left:
            handle.write(bytes(min(1 << 20, free - left)))
    return ballast


def fills(stage: str, *, at_start: bool) -> Callable[[Place], str]:
    """Let the disk be nearly full from the start, or fill at a random moment of a stage's work."""

    def attempt(place: Place) -> str:
        with disk(place.out):
            _copy_before(place, stage)
            work = place.run(stage)
            if at_start:
                ballast = fill(place.out, place.random.randrange(4096, 2_000_000))
                ended = place.do(work)
            else:
                command = place.start(work)
                if command.until((place.out / FIRST[stage]).exists):
                    time.sleep(place.random.uniform(0, 0.3))
                ballast = fill(place.out)
                ended = command.wait()
            if ended.code:
                ended.refused("disk")
            ballast.unlink()
            place.do(work).succeeded()
            place.check(stage)
        return ended.message

    return attempt


def _copy_before(place: Place, stage: str) -> None:
    """Copy the run as it is before a stage onto the mounted disk."""
    within = Place(place.folder / "copy", place.reference, place.random)
    within.folder.mkdir()
    shutil.copytree(within.before(stage), place.out, dirs_exist_ok=True)


def not_allowed(stage: str) -> Callable[[Place], str]:
    """Do a stage as a user who may read the run's folder only."""

    def attempt(place: Place) -> str:
        before = contents(place.before(stage))
        place.folder.chmod(0o777)
        ended = place.do(place.run(stage), lambda: os.setresuid(NOBODY, NOBODY, NOBODY)).refused("cannot be accessed")
        if contents(place.out) != before:
            raise Failure("a refused command changed something")
        return ended.message

    return attempt


SCENARIOS = [
    *(Scenario(f"a disk nearly full when `sfd {s}` starts", fills(s, at_start=True), 4, root=True) for s in FIRST),
    *(Scenario(f"a disk that fills during `sfd {s}`", fills(s, at_start=False), 6, root=True) for s in FIRST),
    *(Scenario(f"a folder that `sfd {s}` may only read", not_allowed(s), root=True) for s in FIRST),
]
