"""Results as tables, as a page, and as a picture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.measuring import ROOT, Row
from sfd.utils import files
from sfd.utils.errors import SFDError

RESULTS = ROOT / "docs" / "results" / "performance.json"
PAGES = ROOT / "docs" / "performance.md", ROOT / "docs" / "sampling.md"  # the first has a place for every section
FIGURE = ROOT / "docs" / "figures" / "speed.png"


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_cell(name, row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "—"
    if name.startswith("share") or name == "waiting":
        return f"{value:.1%}" if name == "share_outside" else f"{value:.0%}"
    if name == "ratio" or name.startswith("of_the_plain") or (name.endswith("seconds") and "milliseconds" not in name):
        return f"{value:.2f}"
    if name == "flops_per_second":
        return f"{value / 1e9:,.0f} G"
    if "bytes" in name:
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def keep(path: Path, results: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Write the sections that ran to a file, in place of what it had of them; give all that it has now.

    Those of a type of device other than the CPU are kept apart, under its name.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": []}
    if device == "cpu":
        kept = _merged(kept, results)
    else:
        kept[device] = _merged(kept.get(device, {"machine": []}), results)
    files.write_text(path, json.dumps(kept, indent=1) + "\n")
    return kept


def publish(results: dict[str, Any], device: str = "cpu") -> None:
    """Keep the sections that ran for the pages, and write the tables of these anew."""
    kept = keep(RESULTS, results, device)
    for each in PAGES:
        files.write_text(each, page(each.read_text(encoding="utf-8"), kept))
    draw(kept, FIGURE)


def check_place(device: str) -> None:
    """See that the page has a place for figures of a type of device.

    Raises:
        SFDError: it has none.
    """
    marker = f"<!-- {device} -->"
    if device != "cpu" and marker not in PAGES[0].read_text(encoding="utf-8"):
        raise SFDError(
            f"{PAGES[0].name} has no place for figures of {device}: write `{marker}` and `<!-- end of {device} -->` "
            "into it, or leave --publish out"
        )


def _merged(kept: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    ran = [row["section"] for row in results["machine"]]
    where = [row for row in kept["machine"] if row["section"] not in ran] + results["machine"]
    return kept | results | {"machine": where}


def page(text: str, results: dict[str, Any]) -> str:
    """Put the tables of the results into a page, between its markers; of another device all tables in one place."""
    for name, rows in results.items():
        if isinstance(rows, list):
            text = _between(text, name, table(rows))
        else:
            text = _between(text, name, "\n\n".join(f"`{section}`:\n\n{table(each)}" for section, each in rows.items()))
    return text


def _between(text: str, name: str, shown: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{shown}\n{end}", text, flags=re.S)


def keep_file(path: Path, name: str, device: str) -> None:
    """Keep a file of numbers in docs/results; a device other than the CPU has its own."""
    kept = RESULTS.parent / name
    shutil.copyfile(path, kept if device == "cpu" else kept.with_stem(f"{kept.stem}-{device}"))


def draw_figure(name: str) -> None:
    """Draw a figure of docs/figures/make.py anew."""
    subprocess.run([sys.executable, str(FIGURE.parent / "make.py"), name], check=True)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as the plain path each way of sampling and training is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, section in zip(axes, ("sampling", "training"), strict=True):
        rows = results.get(section, [])
        axis.barh([f"{r['size']}, batch {r['batch']}, {r['way']}" for r in rows], [r["ratio"] for r in rows])
        axis.axvline(1, color="k", linewidth=0.8)
        axis.set_title(f"{section}: times the plain float32 path", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    figure.savefig(path, dpi=90, format="png")
