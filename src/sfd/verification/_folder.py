"""Finding the cases in a folder, and checking them one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfd.utils import files, registry
from sfd.utils.errors import SFDError
from sfd.verification._case import Case, Row

PACKAGE = "sfd.verification"
TENSORS = ".safetensors"


@dataclass(frozen=True)
class Findings:
    """What came of a folder."""

    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    """Quantities that a case of this configuration could have, but for which the folder has no reference."""
    unchecked: tuple[str, ...]
    """References and files that nothing here knows, so that nothing was checked by them."""
    errors: tuple[str, ...]
    """Why a case could not be checked to its end: a file is missing, damaged or contradicts another."""

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows above their tolerance."""
        return tuple(row for row in self.rows if not row.passed)


def verify(folder: Path, device: torch.device, tolerance: float = 1e-4) -> Findings:
    """Run our code, in float32, on the inputs of all reference cases in a folder, with their weights.

    Args:
        folder: cases as docs/verify.md describes them.
        device: where networks compute; metrics are float64 on the CPU.
        tolerance: relative error that is allowed, dopri5 ten times that and metrics a hundredth.

    What is wrong with one case keeps none of the others from being checked.

    Raises:
        SFDError: there is no case in the folder.
    """
    if not folder.is_dir():
        raise SFDError(f"{folder} is no folder; give one with reference cases")
    cases, errors = [], []
    with _full_precision():
        for name in _candidates(folder):
            case = None
            try:
                values = _values(folder, name)
                module = next((m for m in _kinds() if m.claims(folder, name, values)), None)
                if module is not None:
                    case = Case(folder, name, values, device, tolerance)
                    cases.append(case)
                    _check(module, case)
            except SFDError as error:
                errors.append(f"{folder}, case {name}: {error}" if case else str(error))
    if not cases and not errors:
        raise SFDError(f"{folder} holds no reference cases; give a folder with NAME.json and NAME.io.safetensors")
    return Findings(
        tuple(row for case in cases for row in case.rows),
        tuple(f"{case.name}: {quantity}" for case in cases for quantity in case.missing),
        (*(f"{c.name}: {quantity}" for c in cases for quantity in c.unchecked), *_strangers(folder, cases)),
        tuple(errors),
    )


def _check(module: Any, case: Case) -> None:
    try:
        module.check(case)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        # Inputs that contradict each other in a way that no check above foresaw.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SFDError(f"its files cannot be used together ({reason})") from error


def _kinds() -> list[Any]:
    return [registry.find(PACKAGE, name, "case") for name in registry.names(PACKAGE)]


def _candidates(folder: Path) -> list[str]:
    """Name everything that may be a case: JSON files, and folders of shards."""
    found = {path.stem for path in folder.glob("*.json")}
    return sorted(found | {path.name for path in folder.iterdir() if path.is_dir() and any(path.glob(f"*{TENSORS}"))})


def _values(folder: Path, name: str) -> Mapping[str, Any]:
    """Read a candidate's JSON; a folder of shards needs none."""
    path = folder / f"{name}.json"
    return files.read_json(path, "folder of reference cases") if path.exists() else {}


def _strangers(folder: Path, cases: list[Case]) -> list[str]:
    """Name the files of data that no case looked at."""
    suspects = {p.name for p in folder.iterdir() if p.suffix in (".json", TENSORS) or p.is_dir()}
    return sorted(suspects.difference(*(case.files for case in cases)))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep matrix products and convolutions on GPUs from rounding their inputs to TensorFloat-32."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before
