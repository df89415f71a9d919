"""A run's folder and its stages: which are finished, and what each was made from.

`stage.json` in a stage's folder is written before its first step, so that a stopped stage resumes only with what it was
started with.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from sfd.run.recipe import Recipe, dump_recipe
from sfd.training.config import TrainSettings
from sfd.training.trainer import check_resume
from sfd.utils import distributed, files
from sfd.utils.config import Settings, first_difference, with_defaults
from sfd.utils.device import peak_memory, reset_peak_memory
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
class Run:
    """What every stage is given: the recipe, where results go, and the device."""

    record: ClassVar[type[Settings]] = Recipe

    recipe: Recipe
    folder: RunFolder
    device: torch.device

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """The recipe's fields that a result depends on."""
        return self.recipe.fixed()

    def save_recipe(self) -> None:
        """Write the resolved recipe of the last accepted command."""
        files.write_text(self.folder.recipe, dump_recipe(self.recipe), shared=True)


class Given(Protocol):
    """What the class `Stage` needs of a run."""

    record: ClassVar[type[Settings]]  # holds the fields

    @property
    def device(self) -> torch.device:
        """Where to work."""

    @property
    def fixed(self) -> dict[str, Any]:
        """The fields that a result depends on."""

    def save_recipe(self) -> None:
        """Write the fields of the last accepted command."""


RunType = TypeVar("RunType", bound=Given)


class Stage(ABC, Generic[RunType]):
    """One part of a run: what it is made from, the work, and what it writes.

    Before any stage works, `check_recipe` refuses a recipe that differs from the recorded one, and `check_extension`
    more steps for a stage whose result was used. `make` and `require` also compare the inputs, which may load them.
    """

    together = True  # whether all ranks do the work; otherwise rank 0 does, and the others wait for it
    sources: tuple[Stage[Any], ...] = ()  # stages whose results it reads

    def __init__(
        self,
        run: RunType,
        name: str,
        command: str,
        folder: Path,
        fields: Sequence[str],
        train: TrainSettings | None = None,
    ) -> None:
        """Describe the stage; nothing is loaded.

        Args:
            run: recipe, folder and device.
            name: for people ("texture encoder").
            command: what makes it ("sfd train-texture").
            folder: holds its record.
            fields: dotted names of the recipe's fields that it depends on.
            train: how it is trained, if it is; with more steps a finished stage resumes.
        """
        self.run, self.name, self.command, self.folder, self.train = run, name, command, folder, train
        self.fields = pick(run.fixed, *fields)

    def needed(self) -> bool:
        """Whether the recipe asks for this stage."""
        return True

    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """Identities of the images and of the other stages' results that it reads, as JSON values."""

    @abstractmethod
    def results(self) -> Sequence[Path]:
        """Files that must exist for it to be finished."""

    @abstractmethod
    def work(self) -> None:
        """Make the results; resume where an earlier attempt stopped."""

    def make(self) -> None:
        """Do the work, unless it is done or not needed, and record its time and memory; refuse other inputs."""
        if not self.needed():
            return
        if not distributed.decide(self._begin):
            say(f"{self.name}: done before, in {self.folder}")
            return
        if distributed.is_main_process() or not distributed.has_group():
            self._work_and_record()
        elif self.together:
            self.work()
        distributed.broadcast(None)

    def check_recipe(self) -> None:
        """Refuse a recipe that differs from the recorded one, if the stage was started. Loads nothing."""
        self._refuse_change("recipe", self.fields, "with another recipe")

    def check_extension(self, others: Sequence[Stage[Any]]) -> None:
        """Refuse to train a finished stage further where other stages were made from its result."""
        record = self._read()
        if self.train is None or record is None or not record["finished"] or record["steps"] == self._steps:
            return
        check_resume(self.folder, self.train, self.run.device)  # says so where no more steps are possible at all
        after = [str(stage.folder) for stage in others if stage._uses(self) and (stage.folder / RECORD).exists()]
        if after:
            raise SFDError(
                f"{self.folder} was trained for {record['steps']} steps and used for {', '.join(after)}; "
                f"to train it for {self._steps}, give another --out folder, or remove {' '.join(after)} first"
            )

    def finished(self) -> bool:
        """Tell whether the stage is done, for as many steps, and all its results exist; refuse other inputs."""
        self.check_recipe()
        self._refuse_change("inputs", self._inputs, "from other inputs")
        record = self._read()
        return (
            record is not None
            and record["finished"] is not None
            and record["steps"] == self._steps
            and all(path.exists() for path in self.results())
        )

    def require(self) -> None:
        """Refuse to continue without this stage's results."""
        if self.finished():
            return
        record = self._read() or {}
        trained = bool(record.get("finished")) and record["steps"] != self._steps
        reason = f": it was made with steps = {record['steps']}, not {self._steps}" if trained else ""
        raise SFDError(f"{self.folder} holds no finished {self.name}{reason}; run `{self.command}` first, or `sfd run`")

    def _uses(self, other: Stage[Any]) -> bool:
        return any(source is other or source._uses(other) for source in self.sources)

    @cached_property
    def _inputs(self) -> Mapping[str, Any]:
        return self.inputs()

    @property
    def _steps(self) -> int | None:
        return self.train.steps if self.train is not None else None

    def _begin(self) -> bool:
        """Tell whether there is something to do; if so, record the stage as unfinished."""
        if self.finished():
            return False
        if self.train is not None:
            check_resume(self.folder, self.train, self.run.device)
        self.run.save_recipe()
        self._write(finished=None, seconds=self._elapsed())
        return True

    def _work_and_record(self) -> None:
        say(f"{self.name} → {self.folder}")
        reset_peak_memory(self.run.device)
        start, finished = time.monotonic(), None
        try:
            self.work()
            if all(path.exists() for path in self.results()):  # else other ranks of an array job make the rest
                finished = datetime.now(timezone.utc).isoformat()
        finally:  # an interrupted attempt counts too; one that is killed outright cannot be counted
            seconds = self._elapsed() + time.monotonic() - start
            self._write(finished=finished, seconds=seconds, **peak_memory(self.run.device))

    def _elapsed(self) -> float:
        record = self._read()
        return float(record["seconds"]) if record else 0.0

    def _read(self) -> dict[str, Any] | None:
        """Give the record, or None before the first start; refuse a folder of other files."""
        path = self.folder / RECORD
        if path.exists():
            record = files.read_json(path, "stage")
            if not record.keys() >= {"finished", "seconds", "recipe", "inputs", "steps"}:
                raise SFDError(
                    f"{path} was written by another version of sfd; give another --out folder, or remove {self.folder}"
                )
            return record
        if self.folder.is_dir() and any(not p.name.startswith(".") and p.name != RECORD for p in self.folder.iterdir()):
            raise SFDError(
                f"{self.folder} holds files, but no {RECORD} that says what they were made from; give another "
                "--out folder, or remove them"
            )
        return None

    def _write(self, **progress: Any) -> None:
        made_from = {"recipe": self.fields, "inputs": self._inputs, "steps": self._steps}
        files.write_json(self.folder / RECORD, {"stage": self.name, **progress, **made_from}, shared=True)

    def _refuse_change(self, part: str, now: Mapping[str, Any], how: str) -> None:
        """Refuse a part, "recipe" or "inputs", that differs from the recorded one, if the stage was started."""
        record, now = self._read(), files.jsonable(now)
        if record is None:
            return
        before = with_defaults(record[part], now, self.run.record) if part == "recipe" else record[part]
        different = first_difference(before, now)
        if different is not None:
            field, old, value = different
            of_recipe = part == "recipe" and self.run.record is Recipe
            own = "the run's folder alone to keep its recipe, " if of_recipe else ""
            raise SFDError(
                f"{self.folder} was made {how}: {field} was {old!r} before and is {value!r} now; "
                f"give {own}another --out folder, or remove {self.folder} to make it anew"
            )


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
