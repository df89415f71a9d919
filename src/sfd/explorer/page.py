"""The page: one file of HTML that needs nothing else, filled with what it has to know of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sfd.explorer.compute import Request, compute, facts
from sfd.generation.model import Model
from sfd.utils.errors import SFDError

MARK = '<meta name="generator" content="sfd explore">'
MAX_STATIC = 64  # samples on one self-contained page


def render(known: dict[str, Any]) -> str:
    """Fill the page with facts; as JSON in a script, so that no class name can end the script."""
    text = json.dumps(known, ensure_ascii=False, allow_nan=False)
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    page = resources.files("sfd.explorer").joinpath("page.html").read_text(encoding="utf-8")
    return page.replace("/*FACTS*/ null", text)


def static_page(model: Model, labels: Sequence[int], seeds: Sequence[int], name: str, **settings: Any) -> str:
    """One self-contained page of samples, each of `labels` with each of `seeds`; see `facts` for the settings."""
    pairs = [(label, seed) for label in labels for seed in seeds]
    if len(pairs) > MAX_STATIC:
        raise SFDError(f"a page holds at most {MAX_STATIC} samples, not {len(pairs)}; choose fewer classes or seeds")
    known = facts(model, name, **settings)
    requests = [Request(label=label if model.classes else None, seed=seed, **known["start"]) for label, seed in pairs]
    return render(known | {"results": [compute(model, request) for request in requests]})


def is_page(path: Path) -> bool:
    """Whether a file is a page that `sfd explore` wrote."""
    return MARK in path.read_bytes()[:4096].decode("utf-8", "replace")
