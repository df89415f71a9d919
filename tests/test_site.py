"""The documentation site: its pages are all in the navigation, its reference is generated, its notebooks run.

`make docs` builds the site itself, with warnings as errors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

from docs.site import generated, pages
from sfd.cli.main import main
from sfd.run.recipe import Recipe

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = {"__name__": path.stem}
    for cell in cells(path, "code"):
        exec(compile("".join(cell["source"]), str(path), "exec"), names)
    pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_executed_and_small(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 400_000
    assert str(Path.home()) not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_to_files(path):
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (path.parent / link).exists()] == []


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    own = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    made = {*pages.COPIED.values(), "reference/commands.md", "reference/recipe-fields.md"}
    assert listed == own | made | {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}


def test_the_reference_has_every_command_option_and_field():
    commands, fields = generated.commands(), generated.recipe_fields()
    for name, command in main.commands.items():
        section = commands.partition(f"## sfd {name}\n")[2].partition("\n## ")[0]
        shown = [option for param in command.params if not getattr(param, "hidden", False) for option in param.opts]
        assert section and all(option in section for option in shown if option.startswith("--")), name
    schema = Recipe.model_json_schema()
    known = {name for record in (schema, *schema["$defs"].values()) for name in record.get("properties", ())}
    assert len(known) > 80 and known <= set(re.findall(r"^\| `([\w.]+)` \|", fields, re.MULTILINE))


def test_a_notebook_becomes_a_page(tmp_path):
    path = tmp_path / "one.ipynb"
    shown = {"output_type": "display_data", "data": {"image/png": "QUJD\n"}, "metadata": {}}
    printed = {"output_type": "stream", "name": "stdout", "text": ["2\n"]}
    code = {"cell_type": "code", "source": ["print(1 + 1)"], "outputs": [printed, shown]}
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# One"]}, code]}), encoding="utf-8")
    page = pages.notebook(path)
    assert page.startswith("# One\n")
    assert "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n\n![figure](data:image/png;base64,QUJD)" in page
