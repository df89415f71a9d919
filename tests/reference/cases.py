"""The cases in a folder of reference numbers, and a row for each quantity of theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SHIPPED = Path(__file__).parents[1] / "golden"
PARTS = {  # NAME.PART.safetensors of each kind of case
    "transformer": ("io", "weights", "guide_weights"),
    "semvae": ("io", "weights"),
    "autoencoder": ("io", "weights"),
    "metrics": ("io",),
    "shards": ("expected",),
    "checkpoint_names": (),
}
METRICS = ("frechet_distance", "inception_score", "precision_k", "recall_k")


class Row(NamedTuple):
    """One quantity of a case."""

    case: str
    quantity: str
    error: float | None = None  # relative, or 1 where something exact differs; None: no test compares it
    tolerance: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it was compared and is off; NaN always is."""
        return self.error is not None and not self.error <= self.tolerance


class Tensors(dict[str, Tensor]):
    """The tensors of a file, which remembers the names that were read."""

    def __init__(self, path: Path | None = None) -> None:
        try:
            super().__init__(load_file(path) if path else {})
        except (OSError, SafetensorError) as error:
            bad(f"{path.name} is missing or damaged: {error}")
        self.path, self.read = path, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            bad(f"{self.path.name} lacks the tensor {name!r}")
        self.read.add(name)
        return super().__getitem__(name)


class Case:
    """The fields of NAME.json, the tensors of NAME.PART.safetensors, and a row for each quantity."""

    def __init__(self, folder: Path, name: str, device: torch.device, rows: list[Row] | None = None) -> None:
        self.folder, self.name, self.device = folder, name, device
        self.rows: list[Row] = [] if rows is None else rows
        self.fields, self.tensors = read_fields(folder, name), Tensors()
        self._read: set[str] = set()

    def __getitem__(self, field: str) -> Any:
        if field not in self.fields:
            bad(f"{self.name}.json lacks the field {field!r}")
        self._read.add(field)
        return self.fields[field]

    def weights(self, part: str = "weights") -> dict[str, Tensor]:
        return dict(Tensors(self.folder / f"{self.name}.{part}.safetensors"))

    def io(self, part: str = "io", on_device: bool = True) -> Tensors:
        """Read inputs and outputs: as stored, or numbers as float32 on the device."""
        self.tensors = Tensors(self.folder / f"{self.name}.{part}.safetensors")
        for name, tensor in self.tensors.items() if on_device else ():
            self.tensors[name] = (tensor.float() if tensor.is_floating_point() else tensor).to(self.device)
        return self.tensors

    def compare(self, quantity: str, ours: Tensor, tolerance: float = 1e-4, reference: Tensor | None = None) -> None:
        """Add a row with ‖ours − reference‖ / ‖reference‖, 2-norms in float64 on the CPU, if there is a reference."""
        if reference is None:
            if quantity not in self.tensors:
                return
            reference = self.tensors[quantity]
        a, b = ours.detach().cpu().double(), reference.cpu().double()
        if a.numel() != b.numel():
            bad(f"{self.name}: {quantity} has shape {tuple(b.shape)}, but the inputs give {tuple(a.shape)}")
        size = float(b.norm())
        self.rows.append(Row(self.name, quantity, float((a.flatten() - b.flatten()).norm()) / (size or 1), tolerance))

    def compare_exactly(self, field: str, ours: Any) -> None:
        """Add a row for a field of NAME.json, if it is there."""
        if field in self.fields:
            self.rows.append(Row(self.name, field, float(self[field] != ours)))

    def finish(self, *inputs: str) -> None:
        """Add a row for each tensor and field that nothing read, but for inputs; fail where a row does."""
        own = [row for row in self.rows if row.case == self.name]
        assert own, f"{self.name} holds no quantity that any test compares"
        unread = [field for field, value in self.fields.items() if not isinstance(value, str)]
        unread = [field for field in unread if field not in self._read]
        unread += [name for name in self.tensors if name not in self.tensors.read]
        self.rows += [Row(self.name, name) for name in unread if name not in inputs]
        failed = [f"{row.quantity} is off by {row.error:.2e}" for row in own if row.failed]
        assert not failed, f"{self.name}: {', '.join(failed)}"


def bad(sentence: str) -> None:
    """Fail because a file of a case is missing, malformed or contradicts another."""
    pytest.fail(sentence, pytrace=False)


def read_fields(folder: Path, name: str) -> dict[str, Any]:
    """Read NAME.json; shards need none."""
    path = folder / f"{name}.json"
    if not path.exists() and ((folder / name).is_dir() or (folder / f"{name}.expected.safetensors").exists()):
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        bad(f"{path.name} is missing or damaged: {error}")
    return fields if isinstance(fields, dict) else bad(f"{path.name} is no JSON object")


def find_cases(folder: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Find the kind of each case by its contents; also what is wrong with others, and the files that no test knows."""
    files = {path.name: _split(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    files = {file: found for file, found in files.items() if found is not None}
    parts = {part for each in PARTS.values() for part in each}
    kinds, problems = {}, {}
    for name in sorted({name for name, part in files.values() if part in {"", *parts}}):
        try:
            kind = _kind(name, read_fields(folder, name))
            if kind:
                kinds[name] = kind
            elif any((name, part) in files.values() for part in parts):
                bad(f"{name}.json has tensors beside it, but describes no kind of case that a test knows")
        except pytest.fail.Exception as problem:
            problems[name] = str(problem)
    unknown = [f for f, (name, part) in files.items() if part and part not in PARTS.get(kinds.get(name, ""), ())]
    unknown += [f for f, (name, part) in files.items() if not part and name not in kinds.keys() | problems.keys()]
    if not kinds and not problems:
        problems[""] = f"{folder} holds no reference cases; give a folder with NAME.json and NAME.io.safetensors"
    return kinds, list(problems.values()), unknown


def _split(path: Path) -> tuple[str, str] | None:
    """NAME and PART of a file that may belong to a case; a JSON file and a folder of shards have no part."""
    if path.is_dir():
        return (path.name, "") if any(path.glob("*.safetensors")) else None
    name, _, part = path.stem.rpartition(".")
    return {".json": (path.stem, ""), ".safetensors": (name, part)}.get(path.suffix)


def _kind(name: str, fields: Mapping[str, Any]) -> str | None:
    if "state_dict" in fields or name.startswith("keys_"):
        return "checkpoint_names"
    if isinstance(fields.get("config"), dict):
        return "transformer"
    if "input_dim" in fields and "latent_dim" in fields:
        return "semvae"
    if "channel_multipliers" in fields:
        return "autoencoder"
    if any(field.startswith(METRICS) for field in fields):
        return "metrics"
    return None if fields else "shards"
