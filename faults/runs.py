"""A tiny run without faults, what must equal it after a fault, and what a row of the table is made from."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

import torch

from faults.commands import Command, Condition, Ended, Failure
from sfd.cli.main import main

TINY = Path(__file__).parent.parent / "tests" / "tiny.yaml"
RECIPE = f"""
extends: "{TINY}"
name: faults
texture: {{train: {{steps: 6, checkpoint_every: 2, log_every: 1}}}}
compressor: {{train: {{steps: 6, checkpoint_every: 2, log_every: 1}}}}
latents: {{shard_size: 10, batch_size: 5}}
train: {{steps: 20, preview_every: 10, checkpoint_every: 3}}
sample: {{batch_size: 4}}
evaluation: {{samples_per_class: 3}}
"""
TIMING = {"images_per_second", "checkpoint_pause", "waiting", "finished", "seconds", "peak_memory_bytes"}
# What holds times, locks, and what a killed process had half written, which nothing reads.
PASSED_OVER = ("report.html", "recipe.yaml", "previews", ".lock", ".partial")
# The output of each stage, in the order of the stages.
MADE = {
    "train-texture": ("texture",),
    "train-semantic": ("semantic",),
    "train-semvae": ("compressor",),
    "prepare": ("latents",),
    "train": ("training", "model"),
    "train-evaluator": ("evaluator",),
    "report": ("samples", "metrics", "report.html"),
}


class Lost(Failure):
    """The result differs from that of an uninterrupted run."""


@dataclass
class Place:
    """The folder of one try, and the reference run."""

    folder: Path
    reference: Path
    random: Random
    number: int = 0  # of the try
    _numbers: count[int] = field(default_factory=count)

    @property
    def out(self) -> Path:
        """The folder of the faulty run."""
        return self.folder / "out"

    def before(self, command: str) -> Path:
        """Copy the reference run without the output of this command and of later ones (except the evaluator)."""
        later = list(MADE)[list(MADE).index(command) :]
        gone = {name for stage in later if stage != "train-evaluator" for name in MADE[stage]}
        shutil.copytree(self.reference, self.out, ignore=lambda at, names: gone if Path(at) == self.reference else ())
        return self.out

    def run(self, command: str, *more: object) -> list[object]:
        """Give the arguments of a stage's command."""
        return [command, self.reference.parent / "faults.yaml", "--out", self.out, "--device", "cpu", *more]

    def start(self, arguments: Sequence[object], *conditions: Condition) -> Command:
        """Start a command."""
        return Command(arguments, self.folder / f"output-{next(self._numbers)}.txt", conditions)

    def do(self, arguments: Sequence[object], *conditions: Condition) -> Ended:
        """Run a command to its end."""
        return self.start(arguments, *conditions).wait()

    def check(self, command: str) -> None:
        """Insist that the output of a command equals the reference."""
        for name in MADE[command]:
            check_same(self.out / name, self.reference / name)

    def say(self, message: str) -> str:
        """Give a message as the table shows it."""
        return message.replace(f"{self.folder}/", "").replace(str(self.folder), "").replace(str(self.reference), "RUN")


def check_same(found: Path, expected: Path) -> None:
    """Insist that two folders are byte-equal except for times; otherwise raise `Lost`."""
    a, b = contents(found), contents(expected)
    if different := sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)):
        raise Lost(f"{found.name}: {different[:5]} differ or are in only one of the folders")


def contents(folder: Path) -> dict[str, object]:
    """The bytes of all files below a folder by name; of logs and records, all but times."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    found = {path.relative_to(folder.parent).as_posix(): path for path in files if path.is_file()}
    # A stopped run keeps the checkpoint of the step that it was stopped after, in place of an older one.
    older = sorted(name for name in found if "checkpoints/step-" in name)[:-1]
    kept = {name: path for name, path in found.items() if not any(part in name for part in PASSED_OVER)}
    return {name: _content(path) for name, path in kept.items() if name not in older}


def _content(path: Path) -> object:
    if path.name == "log.jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return _timeless(json.loads(path.read_text())) if path.name == "stage.json" else path.read_bytes()


def _timeless(record: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in record.items() if name not in TIMING}


def make_reference(folder: Path) -> Path:
    """Make the reference run in this process, so that forked processes need not import anything."""
    folder.mkdir(parents=True)
    (folder / "faults.yaml").write_text(RECIPE)
    torch.set_num_threads(1)
    out = folder / "run"
    main(["run", str(folder / "faults.yaml"), "--out", str(out), "--device", "cpu"], standalone_mode=False)
    if threading.active_count() > 1:
        raise RuntimeError("threads are left over; this process must not be forked")
    return out


@dataclass(frozen=True)
class Scenario:
    """A fault, and what must hold afterwards."""

    fault: str
    attempt: Callable[[Place], str]  # returns what the user was told; raises `Failure` or `Lost`
    tries: int = 1
    quick: bool = False  # one try belongs to `make test`
    root: bool = False  # needs root
