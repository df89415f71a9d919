"""`sfd edit`: redraw samples or images by streams, and show sources and results as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sfd.cli.sample import asked_labels, parse_seeds, sample_settings
from sfd.data.folder import FolderSource
from sfd.data.grid import image_grid
from sfd.editing.edits import edit_by_name
from sfd.generation.directory import model_folder
from sfd.generation.model import Model, load_model
from sfd.latents import TEXTURE
from sfd.utils import files
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError

OF_TWO = ("swap-plans", "interpolate")  # edits of two sources
SOFTWARE = "sfd edit"  # in the metadata of the PNG
FIRST_NEW_SEED = 1_000_000  # of the results; seeds of sources are smaller by custom


def edit_images(
    model: Path,
    kind: str,
    overrides: Sequence[str],
    classes: str,
    seeds: str,
    images: Path | None,
    delta: float | None,
    count: int,
    to: str | None,
    plan_guidance: float | None,
    start: float | dict[str, float],
    brush: str,
    out: Path,
    device: str,
    **options: Any,
) -> None:
    """Edit each source `count` times; see `sfd edit --help`."""
    files.check_replaceable(out, _is_own, "a picture of edits")
    loaded = load_model(model_folder(model), choose_device(device))
    settings = sample_settings(loaded, overrides, **options).model_dump(mode="json")
    sources, source_seeds = _sources(loaded, classes, parse_seeds(seeds), images, settings)
    label = None if to is None else asked_labels(loaded, to)[0]
    leaders = {name: value for name, value in loaded.schedule.spec.items() if name == "leaders"}
    schedule = None if delta is None else {"name": "offset", "delta": delta} | leaders
    settings |= {"classes": label, "schedule": schedule}
    if plan_guidance is not None:
        settings["plan_guidance"] = plan_guidance
    if kind == "paint":
        settings["brush"] = _brush(loaded, brush)
    at_once = 2 if kind in OF_TWO else 1
    if at_once == 2 and len(sources) != 2:
        raise SFDError(f"{kind} takes two sources, not {len(sources)}; name two classes, or one and two seeds")
    rows = []
    for first in range(0, len(sources), at_once):
        latents, own = sources[first : first + at_once], source_seeds[first : first + at_once]
        new = [FIRST_NEW_SEED + first * count + k for k in range(count)]
        made = edit_by_name(loaded, kind, latents, own, new, start=start, **settings)
        rows.append(np.concatenate([loaded.decode(latents), loaded.decode(made)]))
    picture = image_grid(np.concatenate(rows), columns=len(rows[0]))
    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    with files.atomic_write(out) as partial:
        picture.save(partial, "PNG", pnginfo=about)
    click.echo(f"{out}: {len(rows)} rows, in each the source first" if len(rows) > 1 else f"{out}: sources first")


def _sources(
    model: Model, classes: str, seeds: list[int], images: Path | None, settings: dict[str, Any]
) -> tuple[Tensor, list[int]]:
    """Latents (B, N) of each class with each seed, or of images with a seed each, and the seeds."""
    if images is not None:
        source = FolderSource(images, model.composite[TEXTURE].grid * model.texture.downsample)
        seeds = seeds[: len(source)]
        return model.encode(source.load(np.arange(len(seeds)))).cpu(), seeds
    labels = asked_labels(model, classes)
    each_label = [label for label in labels for _ in seeds]
    each_seed = seeds * len(labels)
    latents = model.sample(each_label if model.classes else None, seeds=each_seed, output="latent", **settings)
    return latents, each_seed


def _brush(model: Model, text: str) -> Tensor:
    """Read LEFT,TOP,RIGHT,BOTTOM in shares of the image's side: a mask (S, S)."""
    side = model.composite[TEXTURE].grid * model.texture.downsample
    try:
        left, top, right, bottom = (round(float(part) * side) for part in text.split(","))
    except ValueError:
        raise SFDError(f"--brush {text!r} must be LEFT,TOP,RIGHT,BOTTOM from 0 to 1, such as 0,0,0.5,1") from None
    if not (0 <= left < right <= side and 0 <= top < bottom <= side):
        raise SFDError(f"--brush {text!r} marks no part of the image; give LEFT < RIGHT and TOP < BOTTOM from 0 to 1")
    mask = torch.zeros(side, side)
    mask[top:bottom, left:right] = 1
    return mask


def _is_own(path: Path) -> bool:
    with Image.open(path) as image:
        return bool(image.info.get("Software") == SOFTWARE)
