"""The page: one file of HTML that needs nothing else, filled with what it has to know of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sfd.explorer.compute import Request, compute, facts
from sfd.explorer.frames import MAX_PIXELS, MAX_SIDE
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


def static_page(
    model: Model,
    samples: Sequence[tuple[int, int]],
    name: str,
    *,
    guiding: Model | None = None,
    side: int = MAX_SIDE,
    pixels: int = MAX_PIXELS,
    **settings: Any,
) -> str:
    """One self-contained page of samples.

    Args:
        model: the generator.
        samples: class and seed of each.
        name: of the model, shown on the page.
        guiding: another model, to guide with.
        side: pixels of an image's side at most.
        pixels: of all pictures together at most; samples get fewer frames instead.
        settings: fields of `SamplingConfig` that differ from the model's own.
    """
    if len(samples) > MAX_STATIC:
        raise SFDError(f"a page holds at most {MAX_STATIC} samples, not {len(samples)}; choose fewer classes or seeds")
    known = facts(model, name, guiding=guiding, side=side, **settings)
    pixels //= max(1, len(samples))
    results = []
    for label, seed in samples:
        request = Request(label=label if model.classes else None, seed=seed, **known["start"])
        results.append(compute(model, request, guiding=guiding, side=side, pixels=pixels, **settings))
    return render(known | {"results": results})


def is_page(path: Path) -> bool:
    """Whether a file is a page that `sfd explore` wrote."""
    return MARK in path.read_bytes()[:4096].decode("utf-8", "replace")
