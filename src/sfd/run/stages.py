"""A run's folder: where each stage writes, which stages are finished, and what each was made from.

`stage.json` in a stage's folder is written before its first step, so that a stopped stage resumes only with what it was
started with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sfd.training.config import TrainSettings
from sfd.training.trainer import check_resume
from sfd.utils import distributed, files
from sfd.utils.config import first_difference
from sfd.utils.device import measured
from sfd.utils.errors import SFDError
from sfd.utils.progress import say

RECORD = "stage.json"


class RunFolder:
    """Paths in a run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.skipped = root / "skipped-images.txt"
        self.checked = root / "checked-images.json"
        self.texture = root / "texture"
        self.semantic = root / "semantic"
        self.compressor = root / "compressor"
        self.latents = root / "latents"
        self.training = root / "training"
        self.model = root / "model"
        self.evaluator = root / "evaluator"
        self.samples = root / "samples"
        self.metrics = root / "metrics"
        self.report = root / "report.html"

    def finished(self) -> list[dict[str, Any]]:
        """List the records of finished stages, in the order in which they ended."""
        paths = (*self.root.glob(f"*/{RECORD}"), *self.samples.glob(f"*/{RECORD}"))
        records = [files.read_json(path, "stage") for path in paths]
        return sorted((r for r in records if r["finished"]), key=lambda record: str(record["finished"]))


@dataclass(frozen=True)
class Stage:
    """One part of a run: what it is made from, and what it writes."""

    name: str
    """For people ("texture encoder")."""
    command: str
    """What makes it ("sfd train-texture")."""
    folder: Path
    """Holds its record."""
    recipe: Mapping[str, Any]
    """The fixed fields of the recipe that it depends on, under their names there."""
    inputs: Callable[[], Mapping[str, Any]]
    """Gives the identities of the images and of the other stages' results that it reads, as JSON values."""
    train: TrainSettings | None = None
    """How it is trained, if it is; with more steps a finished stage resumes."""
    results: tuple[Path, ...] = ()
    """What must exist for it to be finished."""

    @cached_property
    def _inputs(self) -> Mapping[str, Any]:
        return self.inputs()

    @property
    def _steps(self) -> int | None:
        return self.train.steps if self.train is not None else None

    def check_recipe(self) -> None:
        """Refuse a recipe that differs from the recorded one, if the stage was started. Loads nothing."""
        self._compare(("recipe", self.recipe))

    def finished(self) -> bool:
        """Tell whether the stage is done, for as many steps, and all its results exist; refuse other inputs."""
        record = self._compare(("recipe", self.recipe), ("inputs", self._inputs))
        return (
            record is not None
            and record["finished"] is not None
            and record["steps"] == self._steps
            and all(path.exists() for path in self.results)
        )

    def require(self) -> None:
        """Refuse to continue without this stage's results."""
        if self.finished():
            return
        record = self._read() or {}
        trained = bool(record.get("finished")) and record["steps"] != self._steps
        reason = f": it was made with steps = {record['steps']}, not {self._steps}" if trained else ""
        raise SFDError(f"{self.folder} holds no finished {self.name}{reason}; run `{self.command}` first, or `sfd run`")

    def begin(self, device: torch.device, accepted: Callable[[], None]) -> bool:
        """Compare with the record if there is one, and write it as unfinished.

        Args:
            device: where the work is to be done.
            accepted: called before anything is written.

        Returns:
            whether there is something to do.
        """
        if self.finished():
            return False
        if self.train is not None:
            check_resume(self.folder, self.train, device)
        accepted()
        self._write(finished=None, seconds=self._elapsed())
        return True

    def run(
        self, work: Callable[[], object], device: torch.device, accepted: Callable[[], None], *, together: bool = False
    ) -> None:
        """Do the work, unless it is done; then record how long it took and its memory.

        Args:
            work: does it; resumes where an earlier attempt stopped.
            device: whose memory is measured.
            accepted: called on rank 0 once the record agrees, before anything is written.
            together: all ranks do it; otherwise rank 0 does, and the others wait for it.
        """
        if not distributed.decide(lambda: self.begin(device, accepted)):
            say(f"{self.name}: done before, in {self.folder}")
            return
        if distributed.is_main_process() or not distributed.has_group():
            with self._measured(device):
                work()
        elif together:
            work()
        distributed.broadcast(None)

    @contextmanager
    def _measured(self, device: torch.device) -> Iterator[None]:
        """Record the time and the memory of the work, and that the stage is finished if its results exist."""
        say(f"{self.name} → {self.folder}")
        with measured(device) as usage:
            try:
                yield
            except BaseException:
                # An interrupted attempt counts too; one that is killed outright cannot be counted.
                self.add_elapsed(usage.so_far())
                raise
        if not all(path.exists() for path in self.results):  # ranks of an array job make the rest
            self.add_elapsed(usage.seconds)
            return
        usage_record = usage.record()
        usage_record["seconds"] += self._elapsed()
        self._write(finished=files.now(), **usage_record)

    def add_elapsed(self, seconds: float) -> None:
        """Count the time of an attempt that did not finish the stage."""
        record = self._read()
        if record is not None:
            files.write_json(self.folder / RECORD, record | {"seconds": record["seconds"] + seconds}, shared=True)

    def _elapsed(self) -> float:
        record = self._read()
        return float(record["seconds"]) if record else 0.0

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / RECORD
        if not path.exists():
            return None
        record = files.read_json(path, "stage")
        if not record.keys() >= {"finished", "seconds", "recipe", "inputs", "steps"}:
            raise SFDError(
                f"{path} was written by another version of sfd; give another --out folder, or remove {self.folder}"
            )
        return record

    def _write(self, **progress: Any) -> None:
        made_from = {"recipe": self.recipe, "inputs": self._inputs, "steps": self._steps}
        files.write_json(self.folder / RECORD, {"stage": self.name, **progress, **made_from}, shared=True)

    def _compare(self, *parts: tuple[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        """Give the record, or None before the first start; refuse if it differs in any of the named parts."""
        record = self._read()
        if record is None:
            if self.folder.is_dir() and any(
                not p.name.startswith(".") and p.name != RECORD for p in self.folder.iterdir()
            ):
                raise SFDError(
                    f"{self.folder} holds files, but no {RECORD} that says what they were made from; give another "
                    "--out folder, or remove them"
                )
            return None
        for part, now in parts:
            different = first_difference(record[part], files.jsonable(now))
            if different is not None:
                field, before, value = different
                raise SFDError(
                    f"{self.folder} was made with another recipe: {field} was {before!r} before and is {value!r} now; "
                    f"give another --out folder, or remove {self.folder} to make it anew"
                )
        return record


def check(stages: Iterable[Stage]) -> None:
    """Refuse a recipe that differs from what any started stage was made with, before the first of them works."""
    for stage in stages:
        stage.check_recipe()


def pick(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Select fields by dotted names, and keep them nested: ("evaluation.seed",) → {"evaluation": {"seed": …}}."""
    picked: dict[str, Any] = {}
    for name in names:
        *parents, last = name.split(".")
        source, target = fields, picked
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[last] = source[last]
    return picked
