"""Folders of samples: one numbered PNG per image, and `samples.json`, which says how they were made.

Images are made in batches, numbers b·B to (b + 1)·B − 1 for batch size B; rank r of W makes batches r, r + W, … A batch
of which an image is missing is computed again as a whole, so an image's bytes do not depend on where an earlier attempt
stopped or on which rank makes its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfd.data.grid import image_grid
from sfd.data.images import read_image
from sfd.data.listing import meant_as_image
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.latents import TEXTURE
from sfd.utils import distributed, files
from sfd.utils.device import slow_bf16
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar, say

RECORD, GRID = "samples.json", "grid.png"
GRID_COLUMNS, GRID_ROWS, GRID_IMAGES = 10, 24, 100  # images in a row, classes, images of few classes
WRITERS = 4  # threads that compress and write images while the next batch is computed


def write_samples(
    folder: Path,
    model: Model,
    labels: Sequence[int],
    seeds: Sequence[int],
    config: SamplingConfig,
    *,
    guiding: Model | None = None,
) -> int:
    """Sample image i with labels[i] from seeds[i] into `folder`; finished images are not made again.

    Args:
        folder: created if absent; samples made otherwise are refused.
        model: the generator.
        labels: class indices; the null class is the number of classes.
        seeds: one per image, ≥ 0.
        config: solver, steps, guidance, batch size.
        guiding: the guiding model, where `config.guidance_from` is guiding_model.

    Returns:
        the number of images that are still missing, because other ranks are not done.
    """
    model.check_sampling(config, guiding)
    count, size = len(seeds), config.batch_size
    missing = _missing(folder, count)
    side = model.composite[TEXTURE].grid * model.texture.downsample
    # A PNG is no larger than its pixels, but for its head.
    files.check_space(folder, len(missing) * (3 * side * side + 1024), "ask for fewer images")
    record = {
        "model": model.identity,
        "guiding": guiding.identity if guiding else None,
        "sampling": config.model_dump(mode="json"),
        "classes": list(model.classes),
        "labels": list(labels) if model.classes else [],
        "seeds": list(seeds),
    }
    _write_record(folder, record)
    batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
    todo = [batch for batch in distributed.rank_slice(batches) if not missing.isdisjoint(batch)]
    if todo and config.precision == "bf16" and (slowness := slow_bf16(model.device)):
        say(f"sampling: {slowness}")
    writing: list[Future[None]] = []
    with bar("sampling", sum(map(len, todo))) as shown, ThreadPoolExecutor(WRITERS) as pool:
        for batch in todo:
            its_labels, its_seeds = [labels[i] for i in batch], [seeds[i] for i in batch]
            try:
                (made,) = model.sample_batches(its_labels, its_seeds, config, guiding=guiding)
            except torch.OutOfMemoryError:
                raise SFDError(f"{size} images do not fit the memory of {model.device}; set batch_size") from None
            _wait(writing)  # at most one batch behind
            numbered = zip(batch, made.images, strict=True)
            writing = [
                pool.submit(_write_image, image_path(folder, i, count), image) for i, image in numbered if i in missing
            ]
            shown.update(len(batch))
        _wait(writing)
    left = _missing(folder, count)
    if not left:
        for partial in folder.glob(f".[0-9]*.png.*{files.PARTIAL}"):  # of killed processes
            partial.unlink(missing_ok=True)
    return len(left)


def _wait(writing: Sequence[Future[None]]) -> None:
    """Wait until images are written; raise what a writer raised."""
    for image in writing:
        image.result()


def _write_image(path: Path, image: np.ndarray) -> None:
    with files.atomic_write(path, shared=True) as partial:
        Image.fromarray(image).save(partial, "PNG")


def image_path(folder: Path, number: int, count: int) -> Path:
    """File of an image; of `count` images all names have equally many digits, so that they sort by number."""
    return folder / f"{number:0{max(6, len(str(count - 1)))}d}.png"


def _missing(folder: Path, count: int) -> set[int]:
    existing = {path.name for path in folder.glob("*.png")}
    return {number for number in range(count) if image_path(folder, number, count).name not in existing}


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record, the same on every rank; refuse a folder whose record differs in more than the batch size."""
    path = folder / RECORD
    if not path.exists():
        others = folder.is_dir() and any(item.is_dir() or meant_as_image(item.name) for item in folder.iterdir())
        if others and not path.exists():  # another rank may have begun since
            raise SFDError(f"{folder} holds images or folders, but no {RECORD} from sampling; give an empty folder")
        files.write_json(path, record, shared=True)
        return
    before, now = (_flat(each) for each in (files.read_json(path, "folder of samples"), files.jsonable(record)))
    for name, value in now.items():
        if before.get(name) != value and name not in ("batch_size", "compile"):
            values = f"{name} = {before.get(name)!r}, but this command has {value!r}"
            values = f"other {name}" if isinstance(value, list) else values
            raise SFDError(f"{folder} holds samples made with {values}; give another --out folder, or remove that one")


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, **record.get("sampling", {}), "sampling": None}


def grid_rows(labels: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Choose the images that a grid shows: (class, numbers of its images) of each row, at most GRID_COLUMNS of them.

    Of many classes some are shown, evenly chosen; few classes get several rows each.

    Args:
        labels: class of each image.
    """
    by_class: dict[int, list[int]] = {}
    for number, label in enumerate(labels):
        by_class.setdefault(label, []).append(number)
    classes, rows = list(by_class), min(len(by_class), GRID_ROWS)
    each = max(GRID_COLUMNS, GRID_IMAGES // rows)
    return [
        (label, by_class[label][:each][first : first + GRID_COLUMNS])
        for label in (classes[i * len(classes) // rows] for i in range(rows))
        for first in range(0, min(each, len(by_class[label])), GRID_COLUMNS)
    ]


def write_grid(folder: Path, labels: Sequence[int], classes: Sequence[str]) -> int:
    """Show images of a folder as one picture, `grid.png`, with the class of each row; return their number."""
    rows = grid_rows(labels)
    columns = max(len(numbers) for _, numbers in rows)
    places = [row * columns + column for row, (_, numbers) in enumerate(rows) for column in range(len(numbers))]
    names = [(*classes, "")[label] for label, _ in rows]  # the last one is the null class
    images = read_images(folder, [number for _, numbers in rows for number in numbers])
    with files.atomic_write(folder / GRID, shared=True) as partial:
        image_grid(images, columns, labels=names, places=places).save(partial, "PNG")
    return len(places)


def read_images(folder: Path, numbers: Sequence[int]) -> np.ndarray:
    """Read some images of a folder: uint8 (len(numbers), S, S, 3)."""
    paths = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal()}
    images = []
    for number in numbers:
        try:
            images.append(read_image(paths[number].read_bytes()))
        except SFDError as error:
            raise SFDError(
                f"{paths[number]}: {error}; remove it, and run the same command to sample it again"
            ) from None
    return np.stack(images)
