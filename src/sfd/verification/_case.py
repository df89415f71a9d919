"""One case of reference numbers: its files, and what was found when ours were held against them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd.models.component import differences
from sfd.utils import files
from sfd.utils.errors import SFDError


@dataclass(frozen=True)
class Row:
    """One quantity, ours against the reference."""

    case: str
    quantity: str
    error: float  # relative error, or for names a number of differences; NaN if either side has one
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance


class References:
    """The tensors of one file, floating-point ones as float32; it remembers which were asked for."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Read the file.

        Raises:
            SFDError: it is missing or damaged.
        """
        self.path = path
        read = files.read_tensors(path)
        self._tensors = {name: (t.float() if t.is_floating_point() else t).to(device) for name, t in read.items()}
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __getitem__(self, name: str) -> Tensor:
        """Give a tensor.

        Raises:
            SFDError: the file has none of this name.
        """
        if name not in self._tensors:
            raise SFDError(f"{self.path.name} lacks the tensor {name!r}; make or fetch it again")
        self._asked.add(name)
        return self._tensors[name]

    def shaped(self, name: str, *shape: int | None) -> Tensor:
        """Give a tensor of this shape; None stands for any size.

        Raises:
            SFDError: the file has none of this name, or it has another shape.
        """
        tensor = self[name]
        fits = tensor.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise SFDError(f"{self.path.name}: {name!r} has shape {tuple(tensor.shape)}, expected ({wanted})")
        return tensor

    def never_asked(self) -> list[str]:
        """Name the tensors that nothing looked at."""
        return sorted(self._tensors.keys() - self._asked)


class Case:
    """What is checked: `values` from NAME.json, tensors from NAME.PART.safetensors; and what came of it."""

    def __init__(
        self, folder: Path, name: str, values: Mapping[str, Any], device: torch.device, tolerance: float
    ) -> None:
        self.folder, self.name, self.values, self.device, self.tolerance = folder, name, values, device, tolerance
        self.rows: list[Row] = []
        self.missing: list[str] = []
        self.unchecked: list[str] = []
        self.files = {name, f"{name}.json"}

    def path(self, part: str) -> Path:
        """Name one of the case's files, which is looked at then."""
        path = self.folder / f"{self.name}.{part}.safetensors"
        self.files.add(path.name)
        return path

    def references(self, part: str = "io") -> References:
        """Read inputs and outputs."""
        return References(self.path(part), self.device)

    def weights(self, part: str = "weights") -> dict[str, Tensor]:
        """Read a network's weights."""
        return files.read_tensors(self.path(part))

    def value(self, name: str) -> Any:
        """Give a field of NAME.json.

        Raises:
            SFDError: it has none of this name.
        """
        if name not in self.values:
            raise SFDError(f"{self.name}.json lacks the field {name!r}; make or fetch it again")
        return self.values[name]

    def number(self, name: str) -> float:
        """Give a field of NAME.json that is a number.

        Raises:
            SFDError: there is none of this name, or it is no number.
        """
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SFDError(f"{self.name}.json: {name!r} should be a number, but is {value!r}")
        return value

    def compare(self, quantity: str, ours: Tensor, reference: Tensor, factor: float = 1.0) -> None:
        """Add a row: ‖ours − reference‖ / ‖reference‖ against `factor` times the tolerance.

        Raises:
            SFDError: the reference has another number of entries than ours.
        """
        if ours.numel() != reference.numel():
            raise SFDError(
                f"the reference {quantity!r} has shape {tuple(reference.shape)}, but this configuration gives "
                f"{tuple(ours.shape)}"
            )
        error = relative_error(ours.detach(), reference.reshape(ours.shape))
        self.rows.append(Row(self.name, quantity, error, factor * self.tolerance))

    def compare_if_there(self, quantity: str, ours: Tensor, references: References) -> None:
        """Compare with the reference of this name; note that it is missing if there is none."""
        if quantity in references:
            self.compare(quantity, ours, references[quantity])
        else:
            self.missing.append(quantity)

    def compare_names(self, given: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> None:
        """Add a row a kind of difference between a checkpoint's tensors and those that we have a place for."""
        for label, names in differences(given, ours).items():
            self.rows.append(Row(self.name, f"tensors {label}", float(len(names)), 0.0))

    def compare_count(self, quantity: str, ours: int) -> None:
        """Add a row for a number of parameters, which must be exact, if the case has it."""
        if quantity in self.values:
            self.rows.append(Row(self.name, quantity, abs(ours - self.number(quantity)), 0.0))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖, 2-norms in float64 on the CPU; the numerator alone where the reference is 0."""
    a, b = ours.cpu().double(), reference.cpu().double()
    difference, size = float((a - b).norm()), float(b.norm())
    return difference / size if size > 0 or math.isnan(size) else difference
