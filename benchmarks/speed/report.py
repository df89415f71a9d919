"""Results as tables, as a page, and as a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.speed.measuring import ROOT, Row

RESULTS, PAGE = ROOT / "docs" / "results" / "performance.json", ROOT / "docs" / "performance.md"
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
    if name in ("ratio", "of_the_plain_paths") or (name.endswith("seconds") and not name.endswith("milliseconds")):
        return f"{value:.2f}"
    if name == "flops_per_second":
        return f"{value / 1e9:,.0f} G"
    if "bytes" in name:
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def publish(results: dict[str, Any], device: str = "cpu") -> None:
    """Keep the sections that ran, in place of what was kept of them, and write the page's tables anew.

    Those of a type of device other than the CPU are kept apart, under its name.
    """
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"machine": []}
    if device == "cpu":
        kept = _merged(kept, results)
    else:
        kept[device] = _merged(kept.get(device, {"machine": []}), results)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), kept), encoding="utf-8")
    draw(kept, FIGURE)


def _merged(kept: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    ran = [row["section"] for row in results["machine"]]
    where = [row for row in kept["machine"] if row["section"] not in ran] + results["machine"]
    return kept | results | {"machine": where}


def page(text: str, results: dict[str, Any]) -> str:
    """Put the tables of the results into the page, between its markers; of another device all tables in one place."""
    for name, rows in results.items():
        if isinstance(rows, list):
            text = _between(text, name, table(rows))
        else:
            text = _between(text, name, "\n\n".join(f"`{section}`:\n\n{table(each)}" for section, each in rows.items()))
    return text


def _between(text: str, name: str, shown: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{shown}\n{end}", text, flags=re.S)


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
