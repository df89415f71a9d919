"""The documentation's Python is true: every block runs, in order, in an empty folder.

A block whose first line is `# src/sfd/PACKAGE/NAME.py` is written to that file and found as if it were in the package.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sfd.schedule import SCHEDULES
from sfd.solvers import SOLVERS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SOURCE = re.compile(r"\[`([^`\]]+)`\]\((?:\.\./)+(src/[^)]+)\)")  # [`src/sfd/flow.py: name`](../src/sfd/flow.py)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")  # relative, without a scheme
NEW_FILE = re.compile(r"# src/(sfd/\w+)/(\w+)\.py\n")


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and text of every Python block."""
    text = page.read_text(encoding="utf-8")
    found = [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"```py", text)), f"{page}: fence Python as ```python, not indented"
    return found


def add_file(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Write a block that is a new file of a package; False if it is none."""
    declared = NEW_FILE.match(code)
    if declared is None:
        return False
    target = folder / declared[1] / f"{declared[2]}.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(code, encoding="utf-8")
    package = importlib.import_module(declared[1].replace("/", "."))
    assert not (ROOT / "src" / declared[1] / target.name).exists(), f"{target.name} exists; take another example"
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(target.parent)])
    importlib.invalidate_caches()
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [(registry, dict(registry)) for registry in (SCHEDULES, SOLVERS)]  # pages register their own
    (tmp_path / "models").symlink_to(ROOT / "models")  # the trained model that ships with the project
    loaded = set(sys.modules)
    # A module of its own: records look up the names in their annotations there.
    module = ModuleType(f"docs_{page.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module
    try:
        for line, code in blocks(page):
            if not add_file(code, tmp_path, monkeypatch):
                exec(compile("\n" * line + code, str(page), "exec"), module.__dict__)
    finally:
        for registry, entries in before:
            registry.clear()
            registry.update(entries)
        for name in set(sys.modules) - loaded:
            if name == module.__name__ or str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def defined(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """Names that a module or class defines, with their own bodies."""
    names: dict[str, list[ast.stmt]] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node.body
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: [] for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_symbols(page):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    for label, path in SOURCE.findall(text):
        file, _, symbol = " ".join(label.split()).partition(": ")  # a line may end within it
        assert file == path, f"{label} links to {path}"
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body if (ROOT / file).exists() else []
        for name in symbol.split("."):
            if name not in defined(body):
                missing.append(label)
                break
            body = defined(body)[name]
    assert not missing
