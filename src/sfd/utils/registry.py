"""Parts found by file name: `sfd/solvers/heun.py` is the solver `heun`. A new file is all that a new part takes."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from sfd.utils.errors import unknown


def names(package: str) -> list[str]:
    """List the parts of a package: its modules, those with a leading underscore left out."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def find(package: str, name: str, kind: str) -> ModuleType:
    """Import the module `package.name`; only that one, so that an unused part costs nothing."""
    known = names(package)
    if name not in known:
        raise unknown(kind, name, known)
    return importlib.import_module(f"{package}.{name}")
