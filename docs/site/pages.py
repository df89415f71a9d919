"""What the site's pages are made from: copies of pages outside of docs/, notebooks, and links to source files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CODE = "reference/code"
COPIED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "recipes/README.md": "recipes.md",
    "tests/golden/README.md": "golden-numbers.md",
}
SOURCE = re.compile(r"\[([^\]]+)\]\((?:\.\./)*src/(sfd/[^)]+\.py)\)")  # [`src/sfd/flow.py: name`](../src/sfd/flow.py)


def module_name(path: str) -> str:
    """sfd/models/dit.py: sfd.models.dit."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def source_links(text: str) -> list[str]:
    """The source files that a page links to, as sfd/NAME.py."""
    return [match[2] for match in SOURCE.finditer(text)]


def notebook(path: Path) -> str:
    """A notebook as Markdown: texts, code, and what the code printed and drew."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [part for cell in cells for part in _cell(cell)]
    title, *rest = parts
    return "\n\n".join([title, f"*A notebook: [{path.name}]({path.name}).*", *rest]) + "\n"


def _cell(cell: dict[str, Any]) -> list[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [text]
    return [f"```python\n{text}\n```", *(_output(output) for output in cell["outputs"])]


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return "```text\n" + "".join(output["text"]) + "```"
    data = output["data"]
    if "image/png" in data:
        return f"![figure](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    return "```text\n" + "".join(data["text/plain"]) + "\n```"
