"""A run's folder: which stage is where, which are finished, and with what they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sfd import files
from sfd.errors import SFDError
from sfd.progress import console
from sfd.resources import measured

RECORD = "stage.json"


class RunFolder:
    """Where the parts of one run lie."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.texture = root / "texture"
        self.semantic = root / "semantic"
        self.compressor = root / "compressor"
        self.latents = root / "latents"
        self.training = root / "training"
        self.model = root / "model"
        self.evaluator = root / "evaluator"
        self.samples = root / "samples"
        self.report = root / "report.html"

    def stages(self) -> list[dict[str, Any]]:
        """List the records of finished stages, in the order in which they ended."""
        records = [files.read_json(path, "stage") for path in self.root.glob(f"**/{RECORD}")]
        return sorted(records, key=lambda record: record["finished"])


def finished(folder: Path, made_from: Mapping[str, Any], extent: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a stage is done, with these settings and to this extent.

    Raises:
        SFDError: it was done with other settings.
    """
    if not (folder / RECORD).exists():
        return False
    record = files.read_json(folder / RECORD, "stage")
    different = _first_difference(record["made_from"], files.plain(made_from))
    if different is None:
        return bool(record["extent"] == files.plain(extent or {}))
    name, then, now = different
    raise SFDError(
        f"{folder} was made with {name} = {then!r}, but this command has {now!r}; "
        f"give another --out folder, or remove {folder} to make it anew"
    )


def carry_out(
    name: str,
    folder: Path,
    made_from: Mapping[str, Any],
    work: Callable[[], object],
    device: torch.device,
    extent: Mapping[str, Any] | None = None,
) -> None:
    """Do a stage's work, unless it is done; then record what it was made from, how long it took and its memory.

    Args:
        name: for people ("texture encoder").
        folder: of the stage; its record goes there last.
        made_from: plain values that the result depends on.
        work: does it; goes on by itself where an earlier attempt stopped.
        device: whose memory is measured.
        extent: plain values that may differ from those of a finished stage, which then goes on (more steps).
    """
    if finished(folder, made_from, extent):
        console.print(f"{name}: done before, in {folder}", style="dim", markup=False, soft_wrap=True)
        return
    console.print(f"{name} → {folder}", style="bold", markup=False, soft_wrap=True)
    with measured(device) as usage:
        work()
    record = {"stage": name, "finished": files.now(), **vars(usage)}
    record |= {"made_from": files.plain(made_from), "extent": files.plain(extent or {})}
    files.write_json(folder / RECORD, record)


def _first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Find the first field in which two nested values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            found = _first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if before == now else (name, before, now)
