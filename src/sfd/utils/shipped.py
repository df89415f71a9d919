"""The recipes and models that come with the project, found by name.

In a checkout they are the folders `recipes/` and `models/` at its root; in an installed package they are below
`sfd/shipped/`, where `setup.py` puts them.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from sfd.utils.errors import SFDError

PACKAGE = Path(__file__).parent.parent  # .../src/sfd, or .../site-packages/sfd
RECIPE, MODEL = "recipe", "model"


def shipped_folder(kind: str) -> Path:
    """The folder that holds all shipped recipes (`kind` "recipe") or models ("model")."""
    installed = PACKAGE / "shipped" / f"{kind}s"
    return installed if installed.is_dir() else PACKAGE.parent.parent / f"{kind}s"


def shipped(kind: str) -> dict[str, Path]:
    """All shipped recipes or models by name: `shapes-demo`, `imagenet256/xl-80`."""
    folder = shipped_folder(kind)
    if kind == RECIPE:
        return {path.relative_to(folder).as_posix()[: -len(".yaml")]: path for path in folder.rglob("*.yaml")}
    return {path.parent.relative_to(folder).as_posix(): path.parent for path in folder.glob("*/model.json")}


def find_recipe(given: str | Path) -> Path:
    """Resolve a recipe: a file, else a shipped recipe's name, with or without `.yaml`. A file wins over a name."""
    path = Path(given)
    if path.exists() and not path.is_dir():
        return path
    return _by_name(RECIPE, path.as_posix().removesuffix(".yaml"), "a YAML file")


def find_model(given: str | Path) -> Path:
    """Resolve a model: a folder, else a shipped model's name. A folder wins over a name."""
    path = Path(given)
    return path if path.exists() else _by_name(MODEL, path.as_posix(), "a model directory or a run's folder")


def _by_name(kind: str, name: str, otherwise: str) -> Path:
    known = shipped(kind)
    if name in known:
        return known[name]
    nearest = sorted(known, key=lambda other: _likeness(name, other), reverse=True)[:3]
    raise SFDError(
        f"there is no {kind} {name}; give {otherwise}, or a shipped {kind}'s name, such as {', '.join(nearest)}"
    )


def _likeness(given: str, name: str) -> float:
    """0 to 1; the last part of `imagenet256/xl-80` counts by itself too."""
    return max(difflib.SequenceMatcher(None, given, text).ratio() for text in (name, name.split("/")[-1]))
