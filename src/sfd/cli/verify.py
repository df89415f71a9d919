"""What `sfd verify` does: checks a folder of reference numbers and prints a row a quantity."""

from __future__ import annotations

import math
from pathlib import Path

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from sfd import __version__
from sfd.utils import files
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError
from sfd.verification import Findings, Row, verify

PLAIN_WIDTH = 120  # of tables in pipes and logs, whose width nobody knows


def verify_folder(folder: Path, tolerance: float, device: str, out: Path | None) -> bool:
    """Check a folder, print what was found, and say whether everything is within its tolerance.

    Raises:
        SFDError: something could not be checked; what could is printed before.
    """
    where = choose_device(device)
    findings = verify(folder, where, tolerance)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    if findings.rows:
        console.print(_table(findings.rows))
    for label, names in (("not checked", findings.unchecked), ("no reference for", findings.missing)):
        for name in names:
            console.print(f"{label}: {name}", markup=False, highlight=False, soft_wrap=True)
    if findings.rows or not findings.errors:
        console.print(_summary(findings, where), markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        files.write_json(out, _record(findings, folder, where, tolerance))
    if findings.errors:
        raise SFDError("\n".join(findings.errors))
    return not findings.failed


def _table(rows: tuple[Row, ...]) -> Table:
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    for title in ("case", "quantity", "relative error", "tolerance", "verdict"):
        table.add_column(title, justify="right" if title in ("relative error", "tolerance") else "left", no_wrap=True)
    for row in rows:
        verdict = "ok" if row.passed else "[bold red]FAILED[/]"
        exact = row.tolerance == 0  # a count
        error, allowed = (f"{row.error:g}", "0") if exact else (f"{row.error:.2e}", f"{row.tolerance:.1e}")
        table.add_row(row.case, row.quantity, error, allowed, verdict)
    return table


def _summary(findings: Findings, device: torch.device) -> str:
    count, failed = len(findings.rows), len(findings.failed)
    verdict = f"{failed} of {count} quantities FAILED" if failed else f"all {count} quantities are within tolerance"
    others = [f"{len(findings.unchecked)} not checked"] if findings.unchecked else []
    others += [f"{len(findings.missing)} without a reference"] if findings.missing else []
    return f"{'; '.join([verdict, *others])} (float32 on {device.type}, PyTorch {torch.__version__})"


def _record(findings: Findings, folder: Path, device: torch.device, tolerance: float) -> dict[str, object]:
    return {
        "folder": str(folder),
        "device": str(device),
        "versions": {"sfd": __version__, "torch": torch.__version__},
        "tolerance": tolerance,
        "passed": not findings.failed and not findings.errors,
        "rows": [
            {
                "case": row.case,
                "quantity": row.quantity,
                "error": row.error if math.isfinite(row.error) else None,
                "tolerance": row.tolerance,
                "passed": row.passed,
            }
            for row in findings.rows
        ],
        "not_checked": list(findings.unchecked),
        "without_reference": list(findings.missing),
        "errors": list(findings.errors),
    }
