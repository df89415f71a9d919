"""A run's folder: which stage is where, which are finished, and with what they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sfd.utils import distributed, files
from sfd.utils.device import measured
from sfd.utils.errors import SFDError
from sfd.utils.progress import console

RECORD, SPENT = "stage.json", "spent.json"


class RunFolder:
    """Where the parts of one run lie."""

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

    def stages(self) -> list[dict[str, Any]]:
        """List the records of finished stages, in the order in which they ended."""
        records = [files.read_json(path, "stage") for path in self.root.glob(f"**/{RECORD}")]
        return sorted(records, key=lambda record: record["finished"])


@dataclass(frozen=True)
class Stage:
    """One part of a run: what it is made from, and whether it is done."""

    name: str
    """For people ("texture encoder")."""
    command: str
    """What makes it ("sfd train-texture")."""
    folder: Path
    """Its record, which is written last, lies here."""
    made_from: Mapping[str, Any]
    """Plain values that the result depends on: a finished stage with others is another one."""
    extent: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that may grow: a finished stage with others goes on (more steps)."""
    results: tuple[Path, ...] = ()
    """What must be there for it to be done."""

    def finished(self) -> bool:
        """Tell whether the stage is done, with these settings and to this extent, and all its results are there.

        Raises:
            SFDError: it was done with other settings.
        """
        if not (self.folder / RECORD).exists():
            return False
        record = files.read_json(self.folder / RECORD, "stage")
        different = first_difference(record["made_from"], files.jsonable(self.made_from))
        if different is not None:
            name, then, now = different
            raise SFDError(
                f"{self.folder} was made with {name} = {then!r}, but this command has {now!r}; "
                f"give another --out folder, or remove {self.folder} to make it anew"
            )
        return record["extent"] == files.jsonable(self.extent) and all(path.exists() for path in self.results)

    def require(self) -> None:
        """Insist that the stage is done.

        Raises:
            SFDError: it is not, or it was done with other settings.
        """
        if self.finished():
            return
        record = self.folder / RECORD
        then = files.read_json(record, "stage")["extent"] if record.exists() else files.jsonable(self.extent)
        different = first_difference(then, files.jsonable(self.extent))
        reason = f": it was made with {different[0]} = {different[1]}, not {different[2]}" if different else ""
        raise SFDError(f"{self.folder} holds no finished {self.name}{reason}; run `{self.command}` first, or `sfd run`")

    def carry_out(self, work: Callable[[], object], device: torch.device, *, together: bool = False) -> None:
        """Do the work, unless it is done; then record what it was made from, how long it took and its memory.

        Args:
            work: does it; goes on by itself where an earlier attempt stopped.
            device: whose memory is measured.
            together: all of the run's processes do it; otherwise one does, and the others wait for it.
        """
        # One process looks, before any of them changes what it sees.
        if distributed.broadcast(distributed.is_main_process() and self.finished()):
            console.print(f"{self.name}: done before, in {self.folder}", style="dim", markup=False, soft_wrap=True)
            return
        if distributed.is_main_process():
            self._do(work, device)
        elif together:
            work()
        distributed.broadcast(None)

    def _do(self, work: Callable[[], object], device: torch.device) -> None:
        console.print(f"{self.name} → {self.folder}", style="bold", markup=False, soft_wrap=True)
        earlier = self._spent()
        with measured(device) as usage:
            try:
                work()
            except BaseException:
                # An interrupted attempt counts too; one that is killed outright cannot be counted.
                if self.folder.is_dir():
                    self.spend(usage.so_far())
                raise
        record: dict[str, Any] = {"stage": self.name, "finished": files.now(), **usage.record()}
        record["seconds"] += earlier
        record |= {"made_from": files.jsonable(self.made_from), "extent": files.jsonable(self.extent)}
        files.write_json(self.folder / RECORD, record)
        (self.folder / SPENT).unlink(missing_ok=True)

    def spend(self, seconds: float) -> None:
        """Count the time of an attempt that did not finish the stage."""
        files.write_json(self.folder / SPENT, {"seconds": self._spent() + seconds})

    def _spent(self) -> float:
        """Seconds of earlier attempts: interrupted ones, or a finished one that now goes on."""
        for path in (self.folder / SPENT, self.folder / RECORD):
            if path.exists():
                return float(files.read_json(path, "stage")["seconds"])
        return 0.0


def first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Find the first field in which two nested values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            found = first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if before == now else (name, before, now)
