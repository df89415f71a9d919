"""The recipes and models that come with the project, found by name.

In a checkout they are the folders `recipes/` and `models/` at its root; in an installed package they are below
`sfd/shipped/`, where `setup.py` puts them.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from sfd.utils.errors import SFDError
from sfd.utils.paths import user_path

PACKAGE = Path(__file__).parent.parent  # .../src/sfd, or .../site-packages/sfd
RECIPE, MODEL = "recipe", "model"
MODEL_RECORD = "model.json"


def shipped_folder(kind: str) -> Path:
    """The folder that holds all shipped recipes (`kind` "recipe") or models ("model")."""
    installed = PACKAGE / "shipped" / f"{kind}s"
    return installed if installed.is_dir() else PACKAGE.parent.parent / f"{kind}s"


def shipped(kind: str) -> dict[str, Path]:
    """All shipped recipes or models by name: `shapes-demo`, `imagenet256/xl-80`."""
    folder = shipped_folder(kind)
    if kind == RECIPE:
        return {path.relative_to(folder).as_posix()[: -len(".yaml")]: path for path in folder.rglob("*.yaml")}
    return {path.parent.relative_to(folder).as_posix(): path.parent for path in folder.glob(f"*/{MODEL_RECORD}")}


def find_recipe(given: str | Path) -> Path:
    """Resolve a recipe: a file, else a shipped recipe's name, with or without `.yaml`, else a run's folder."""
    path = user_path(given)
    if path.exists() and not path.is_dir():
        return path
    known = shipped(RECIPE)
    name = path.as_posix().removesuffix(".yaml")
    if name in known:
        return known[name]
    if (path / "recipe.yaml").exists():
        return path / "recipe.yaml"
    ends = {other.split("/")[-1]: other for other in known}
    near = [ends[end] for end in difflib.get_close_matches(name.split("/")[-1], ends)]
    raise SFDError(
        f"there is no recipe {path}; "
        + (f"did you mean {' or '.join(near)}?" if near else "give a YAML file, or a name that `sfd recipes` lists")
    )


def find_model(given: str | Path) -> Path:
    """Resolve a model: a folder, else a shipped model's name. A folder wins over a name."""
    path = user_path(given)
    if path.is_file():
        inside = path.parent if path.name == MODEL_RECORD else "a model directory or a run's folder"
        raise SFDError(f"{path} is a file, but a model is a folder; give {inside}")
    if path.exists():
        return path
    known = shipped(MODEL)
    if path.as_posix() not in known:
        near = difflib.get_close_matches(path.name, known, n=1)
        meant = f"did you mean {near[0]}? Else " if near else ""
        raise SFDError(
            f"there is no model {path}; {meant}give a model directory, a run's folder, or a model that comes with sfd "
            f"({', '.join(sorted(known)) or 'none'})"
        )
    return known[path.as_posix()]
