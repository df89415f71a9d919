"""Dependencies of the core, and packages that it must not need."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORBIDDEN = {"torchvision", "timm", "torch-fidelity"}
IMPORT_ALL = """
import pkgutil, sys, sfd
for module in pkgutil.walk_packages(sfd.__path__, "sfd."):
    if module.name != "sfd.__main__":
        __import__(module.name)
print(*sys.modules)
"""


def parsed(texts, extras=()):
    """The requirements that apply here: names with extras."""
    for text in texts:
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield re.sub(r"[-_.]+", "-", needed.name).lower(), tuple(needed.extras)


def everything(texts):
    """All packages that installing these installs."""
    found, queue = set(), list(parsed(texts))
    while queue:
        name, extras = queue.pop()
        if (name, extras) not in found:
            found.add((name, extras))
            queue.extend(parsed(metadata.requires(name) or (), extras))
    return {name for name, _ in found}


def test_the_core_depends_on_neither_torchvision_nor_timm_nor_torch_fidelity():
    brought = everything(PROJECT["dependencies"])
    assert {"torch", "diffusers", "sympy"} <= brought  # the last by way of the first
    assert not brought & FORBIDDEN


def test_no_module_of_the_core_imports_torchvision_timm_or_torch_fidelity():
    found = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True).stdout
    assert "sfd.evaluation.extractors.inception" in found
    assert not {name.split(".")[0] for name in found.split()} & {"torchvision", "timm", "torch_fidelity"}
