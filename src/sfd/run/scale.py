"""A whole run in small, to try a folder of images before hours of work."""

from __future__ import annotations

from typing import Any

from sfd.run.recipe import Recipe
from sfd.utils.config import parse
from sfd.utils.errors import SFDError

FEWEST_SAMPLES = 4  # of a class, unless the recipe has fewer
COUNTS = ("steps", "log_every", "preview_every")  # checkpoints stay as rare as they are


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """Shorten every training of a recipe, and its evaluation; images, networks and batches stay as they are.

    Numbers of steps are multiplied by the scale, and so is the length of the EMA. The recipe's new name says so, and
    the run records the result like any other recipe.

    Args:
        recipe: the whole recipe.
        scale: share of the steps and samples, in (0, 1].
    """
    if not 0 < scale <= 1:
        raise SFDError(f"--scale {scale:g} is no share of a run; give a number above 0, up to 1, such as 0.05")
    values = recipe.model_dump(mode="json")
    evaluation = values["evaluation"]
    classifier = evaluation["classifier"] or {}
    for owner in (values["texture"], values["semantic"], values["compressor"], values):
        _shorten(owner["train"], scale)
    _shorten(classifier.get("training"), scale)
    samples = evaluation["samples_per_class"]
    evaluation["samples_per_class"] = max(round(samples * scale), min(samples, FEWEST_SAMPLES))
    values["name"] += f", scale {scale:g}"
    return parse(Recipe, values)


def _shorten(train: dict[str, Any] | None, scale: float) -> None:
    """Multiply the numbers of steps in a training's settings."""
    if train is None:
        return
    for field in COUNTS:
        if train[field]:
            train[field] = max(1, round(train[field] * scale))
    train["warmup"] = min(round(train["warmup"] * scale), train["steps"])
    train["decay_from"] = min(round(train["decay_from"] * scale), train["steps"] - 1)
    if train["ema"]:
        train["ema"] = max(0.0, 1 - (1 - train["ema"]) / scale)
