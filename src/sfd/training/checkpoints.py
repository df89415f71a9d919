"""Checkpoints: a folder a step, written beside and renamed, with a checksum; the newest intact one counts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfd import files
from sfd.errors import SFDError
from sfd.progress import console

STATE, RECORD = "state.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on: `tensors` by dotted name, `record` for the rest (step, configuration)."""

    step: int
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Give the tensors whose names begin with `prefix.`, that prefix taken off."""
        start = prefix + "."
        return {name[len(start) :]: t for name, t in self.tensors.items() if name.startswith(start)}


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], keep: int) -> None:
    """Write the checkpoint of a step, then remove all but the newest `keep`."""
    files.remove_partials(folder)
    with files.written(folder / f"step-{step:09d}") as partial:
        partial.mkdir()
        files.write_tensors(partial / STATE, tensors)
        files.write_json(partial / RECORD, {**record, "step": step, "sha256": files.checksum(partial / STATE)})
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)


def newest(folder: Path) -> Checkpoint | None:
    """Load the newest intact checkpoint; damaged ones are named and passed over.

    Returns None when there is none at all.

    Raises:
        SFDError: there are checkpoints, but not one is intact.
    """
    damaged = []
    for path in _folders(folder):
        try:
            return _load(path)
        except SFDError as error:
            damaged.append(path.name)
            console.print(f"checkpoint passed over: {error}", style="yellow", markup=False, soft_wrap=True)
    if damaged:
        raise SFDError(f"no intact checkpoint in {folder} ({', '.join(damaged)} damaged); remove it to start anew")
    return None


def _folders(folder: Path) -> list[Path]:
    """List checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _load(path: Path) -> Checkpoint:
    record = files.read_json(path / RECORD, "checkpoint")
    if not (path / STATE).is_file():
        raise SFDError(f"{path / STATE} is missing")
    if files.checksum(path / STATE) != record.get("sha256"):
        raise SFDError(f"{path / STATE} does not match its checksum")
    return Checkpoint(int(record["step"]), files.read_tensors(path / STATE), record)
