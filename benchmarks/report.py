"""Rows as Markdown tables, kept in one file of results and published into the pages of docs/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Row
from sfd.utils import files
from sfd.utils.errors import SFDError

DOCS = ROOT / "docs"
# device type → section → {"machine": … (None: arithmetic), "rows": …, "quick": … (true: not for docs/)}
Results = dict[str, dict[str, Any]]


def table(rows: list[Row]) -> str:
    """Rows as Markdown; columns that hold lists (curves for a figure) are left out."""
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if not isinstance(rows[0].get(name), list)]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_cell(name, row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "—"
    if name.startswith("share") or name in ("waiting", "class_accuracy"):
        return f"{value:.1%}"
    if name == "ratio" or name.startswith("of_the_plain") or (name.endswith("seconds") and "milliseconds" not in name):
        return f"{value:.2f}"
    if name == "flops_per_second":
        return f"{value / 1e9:,.0f} G"
    if "bytes" in name:
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def read(docs: Path = DOCS) -> Results:
    """All results that were published."""
    path = docs / "results" / "benchmarks.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def publish(found: Results, docs: Path = DOCS) -> None:
    """Keep sections in place of earlier ones of the same device type, and write the tables of all pages anew.

    Args:
        found: pages show a section between `<!-- section -->` and `<!-- end of section -->`; those of other devices
            than the CPU are shown together, between `<!-- cuda -->` and so on.
        docs: folder of the pages.
    """
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(docs.rglob("*.md"))}
    results = read(docs)
    for device, sections in found.items():
        for section, kept in sections.items():
            if kept["quick"]:
                raise SFDError(f"{section} on {device} was measured with --quick; measure it without, to publish it")
            marker = f"<!-- {section if device == 'cpu' else device} -->"
            if not any(marker in text for text in pages.values()):
                raise SFDError(
                    f"no page of {docs} has a place for {section} on {device}; write {marker} and its end into one"
                )
            results.setdefault(device, {})[section] = {"machine": kept["machine"], "rows": kept["rows"]}
    filled = {path: fill(text, results) for path, text in pages.items()}
    files.write_text(docs / "results" / "benchmarks.json", json.dumps(results, indent=1) + "\n")
    for path, text in filled.items():
        if text != pages[path]:
            files.write_text(path, text)


def fill(text: str, results: Results) -> str:
    """Write the tables of the results into a page, between its markers."""
    for section, kept in results.get("cpu", {}).items():
        text = _between(text, section, table(kept["rows"]))
    for device in results.keys() - {"cpu"}:
        tables = [f"`{section}`:\n\n{table(kept['rows'])}" for section, kept in results[device].items()]
        text = _between(text, device, "\n\n".join(tables))
    machines = [
        {"section": section} | kept["machine"]
        for sections in results.values()
        for section, kept in sections.items()
        if kept["machine"]
    ]
    return _between(text, "machine", table(machines)) if machines else text


def _between(text: str, name: str, shown: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{shown}\n{end}", text, flags=re.S)
