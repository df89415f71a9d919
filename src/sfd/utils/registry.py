"""Modules found by file name: `sfd/encoders/kl.py` is the encoder `kl`. A new one needs only a new file."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from sfd.utils.errors import unknown


def names(package: str) -> list[str]:
    """List the modules of a package, without those with a leading underscore."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def find(package: str, name: str, kind: str) -> ModuleType:
    """Import the module `package.name`; only that one, so that unused ones cost nothing."""
    known = names(package)
    if name not in known:
        raise unknown(kind, name, known)
    return importlib.import_module(f"{package}.{name}")
