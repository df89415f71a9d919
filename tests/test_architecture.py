"""Imports follow the list in docs/architecture.md, and the root contains only the method."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "sfd"
METHOD = {"schedule", "flow", "latents", "guidance", "solvers", "sampling", "flow_map"}
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LISTED = re.search(r"^## Imports go one way\n.*?^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ORDER = [line.split()[0] for line in LISTED[1].splitlines()] if LISTED else []


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def layer(module: str) -> str:
    """The first name below `sfd`: `sfd.models.dit` is in `models`."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES and layer(name)}


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


def test_the_list_names_every_package():
    there = {layer(name) for name in MODULES} - {"", "__main__"}
    assert set(ORDER) >= METHOD and there == set(ORDER)


def test_imports_follow_the_list():
    place = {name: index for index, name in enumerate(ORDER)}
    down = {
        (name, imported)
        for name, targets in GRAPH.items()
        for imported in targets
        if layer(name) in place and place[layer(imported)] > place[layer(name)]
    }
    assert not down


def test_utils_and_flow_import_nothing_of_the_project():
    needed = {name: {layer(target) for target in GRAPH[name]} for name in GRAPH if layer(name) in ("utils", "flow")}
    assert not {name: layers for name, layers in needed.items() if layers - {"utils"}}


def test_there_are_no_import_cycles():
    tuple(TopologicalSorter(GRAPH).static_order())


def test_the_root_contains_only_the_method():
    assert {path.stem for path in SOURCE.glob("*.py")} - METHOD == {"__init__", "__main__"}
