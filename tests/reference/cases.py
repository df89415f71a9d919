"""The cases in a folder of reference numbers, and a row for each quantity of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

INPUTS = {"x", "y", "t_texture", "t_semantic", "noise", "loss_x1", "loss_x0", "loss_base_time", "loss_features"}
INPUTS |= {"cfg_scale", "guide_config", "autoguidance_scale", "sampler", "features", "images"}
INPUTS |= {"reference_features", "sample_features", "sample_probabilities"}
METRICS = ("frechet_distance", "inception_score", "precision_k", "recall_k")


class Row(NamedTuple):
    """One quantity of a case."""

    case: str
    quantity: str
    error: float | None = None  # relative; None: no test compares it
    tolerance: float = 0.0

    @property
    def failed(self) -> bool:
        return self.error is not None and not self.error <= self.tolerance  # also where it is NaN


def bad(sentence: str) -> BaseException:
    """The failure of a case with a missing, malformed or contradicting file."""
    return pytest.fail.Exception(sentence, pytrace=False)


class Case:
    """The fields of NAME.json and the tensors of NAME.PART.safetensors, and a row for each that is compared."""

    def __init__(self, folder: Path, name: str, device: torch.device, rows: list[Row]) -> None:
        self.folder, self.name, self.device, self.rows = folder, name, device, rows
        self.values = read_fields(folder, name)
        self._read, self._opened = set(INPUTS), {name, f"{name}.json"}

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise bad(f"{self.name}: neither the JSON file nor the tensors have {name!r}")
        self._read.add(name)
        return self.values[name]

    def open(self, part: str = "weights") -> dict[str, Tensor]:
        """Read the tensors of a file as they are stored."""
        path = self.folder / f"{self.name}.{part}.safetensors"
        self._opened.add(path.name)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise bad(f"{path.name} is missing or damaged: {error}") from None

    def load(self, part: str = "io", dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        """Read inputs and outputs; whole numbers keep their type."""
        for name, tensor in self.open(part).items():
            self.values[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).to(device)

    def compare(self, quantity: str, ours: Any, tolerance: float = 1e-4) -> None:
        """Add a row with ‖ours − reference‖ / ‖reference‖ in the 2-norm, if there is a reference."""
        if quantity in self:
            a, b = _exact(ours), _exact(self[quantity])
            if a.numel() != b.numel():
                raise bad(f"{self.name}: {quantity} has shape {tuple(b.shape)}, but the inputs give {tuple(a.shape)}")
            error = (a.flatten() - b.flatten()).norm() / (b.norm() if b.any() else 1)
            exact = not torch.as_tensor(self[quantity]).is_floating_point()  # a count, a size, labels
            self.rows.append(Row(self.name, quantity, float(error), 0.0 if exact else tolerance))

    def finish(self) -> None:
        """Add a row for each value and file that no test read; fail if a row failed."""
        compared = [row for row in self.rows if row.case == self.name]
        unread = [key for key, value in self.values.items() if key not in self._read and not isinstance(value, str)]
        unread += [file for file in files_of(self.folder, self.name) if file not in self._opened]
        self.rows += [Row(self.name, name) for name in unread]
        assert compared, f"{self.name} holds no quantity that any test compares"
        failed = [f"{row.quantity} is off by {row.error:.2e}" for row in compared if row.failed]
        assert not failed, f"{self.name}: {', '.join(failed)}"


def _exact(value: Any) -> Tensor:
    """In float64, which not every device has."""
    return value.detach().cpu().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def files_of(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _owner(path) == name)


def find_cases(folder: Path) -> dict[str, str]:
    """Name and kind of each case in a folder."""
    names = {_owner(path) for path in folder.iterdir()} if folder.is_dir() else set()
    return {name: _kind(folder, name) for name in sorted(names - {""})}


def _owner(path: Path) -> str:
    """Name the case of NAME.json, NAME.PART.safetensors or a folder NAME of shards; nothing for other files."""
    if path.is_dir():
        return path.name if any(path.glob("*.safetensors")) else ""
    owners = {".json": path.stem, ".safetensors": path.stem.rpartition(".")[0] or path.stem}
    return owners.get(path.suffix, "")


def read_fields(folder: Path, name: str) -> dict[str, Any]:
    """Read NAME.json; a folder of shards has none."""
    path = folder / f"{name}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise bad(f"{path.name} is damaged: {error}") from None


def _kind(folder: Path, name: str) -> str:
    try:
        fields = read_fields(folder, name)
    except pytest.fail.Exception:
        return "damaged"
    tells = {
        "checkpoint_names": "state_dict" in fields,
        "transformer": "config" in fields,
        "semvae": "latent_dim" in fields,
        "autoencoder": "channel_multipliers" in fields,
        "metrics": any(field.startswith(METRICS) for field in fields),
        "shards": (folder / name).is_dir() or (folder / f"{name}.expected.safetensors").exists(),
    }
    return next((kind for kind, told in tells.items() if told), "unknown")
