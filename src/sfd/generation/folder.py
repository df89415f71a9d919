"""Folders of samples: one PNG an image, numbered, and `samples.json`, which says how they were made.

Images are made in batches, numbers b·B to (b + 1)·B − 1 for a batch size B that belongs to the folder. A batch of which
an image is missing is computed again as a whole, so an image's bytes do not depend on where earlier attempts stopped
or on which process makes its batch.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfd.data.grid import image_grid
from sfd.generation.device_memory import Sampler, fitting_batch_size
from sfd.generation.generate import SamplingConfig, generate, with_compile
from sfd.generation.model import TEXTURE_STREAM, Model
from sfd.utils import files
from sfd.utils.config import first_difference
from sfd.utils.device import slow_bf16
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar, console
from sfd.utils.shares import WHOLE, Share

RECORD, GRID = "samples.json", "grid.png"
WRITERS = 4  # threads that compress and write images while the next batch is computed
SECONDS_FOR_OTHERS = 600.0  # that another process may take to find the batch size


def write_samples(
    folder: Path,
    model: Model,
    labels: Sequence[int],
    seeds: Sequence[int],
    settings: SamplingConfig,
    *,
    weak: Model | None = None,
    share: Share = WHOLE,
) -> int:
    """Sample image i with labels[i] and seeds[i] into `folder/{i:06d}.png`; images that are there are not made again.

    Args:
        folder: where the images go; made if it is not there.
        model: the generator.
        labels: class indices; the null class asks for none.
        seeds: one an image, ≥ 0.
        settings: solver, steps, guidance; without a batch size, the folder's, or as many images as memory holds.
        weak: a weaker model for AutoGuidance.
        share: of the batches, which this process makes.

    Returns:
        the number of images that are still missing, because other shares are not done.

    Raises:
        SFDError: the folder holds samples made otherwise, another process makes the same share, or the disk is full.
    """
    generate(model, labels, seeds, settings, weak=weak)  # refuses what makes no sense; computes nothing
    record = {
        "model": model.identity,
        "weak": weak.identity if weak else None,
        "sampling": settings.model_dump(mode="json") | {"steps": settings.resolved_steps},
        "classes": list(model.classes),
        "labels": list(labels) if model.classes else [],
        "seeds": list(seeds),
    }
    with _locked(folder, share):
        missing = _missing(folder, len(seeds))
        _check_space(folder, model, len(missing))
        chosen = _claim(folder, record, lambda: _left_open(model, weak, settings, len(seeds)))
        settings, size = settings.model_copy(update=chosen), chosen["batch_size"]
        batches = share.take([range(i, min(i + size, len(seeds))) for i in range(0, len(seeds), size)])
        _remove_partials(folder, batches)
        sampler = Sampler(model, settings, weak)
        total, left = sum(map(len, batches)), sum(number in missing for batch in batches for number in batch)
        if left and settings.precision == "bf16" and (slowness := slow_bf16(model.device)):
            console.print(f"{_description(share)}: {slowness}", style="yellow", markup=False, soft_wrap=True)
        with (
            bar(_description(share), total, total - left) as shown,
            ThreadPoolExecutor(WRITERS) as pool,
        ):
            start, made = time.monotonic(), 0
            for count in _write(folder, batches, missing, labels, seeds, sampler, pool):
                made += count
                shown.advance(count, f"{made / (time.monotonic() - start):.3g} images/s")
    return len(_missing(folder, len(seeds)))


def _write(
    folder: Path,
    batches: Sequence[range],
    missing: set[int],
    labels: Sequence[int],
    seeds: Sequence[int],
    sampler: Sampler,
    pool: ThreadPoolExecutor,
) -> Iterator[int]:
    """Make what is missing of the batches, the images of one being written while the next is computed; count them."""
    pending: deque[list[Future[None]]] = deque()
    for batch in batches:
        if missing.isdisjoint(batch):
            continue
        images = sampler([labels[i] for i in batch], [seeds[i] for i in batch])
        pending.append(
            [pool.submit(_write_image, folder, i, x) for i, x in zip(batch, images, strict=True) if i in missing]
        )
        if len(pending) > 1:
            yield _done(pending.popleft())
    while pending:
        yield _done(pending.popleft())


def _done(writing: list[Future[None]]) -> int:
    for one in writing:
        one.result()
    return len(writing)


def _write_image(folder: Path, number: int, image: np.ndarray) -> None:
    # Shared, because shares of different divisions may overlap: whoever is last writes what the other wrote.
    with files.atomic_write(image_path(folder, number), shared=True) as partial:
        Image.fromarray(image).save(partial, "PNG")


def write_grid(folder: Path, numbers: Sequence[int], columns: int) -> None:
    """Show some images of a folder as one picture, `grid.png`."""
    with files.atomic_write(folder / GRID, shared=True) as partial:
        image_grid(read_images(folder, numbers), columns=columns).save(partial, "PNG")


def read_images(folder: Path, numbers: Sequence[int]) -> np.ndarray:
    """Read some images of a folder: uint8 (len(numbers), S, S, 3)."""
    images = []
    for number in numbers:
        with Image.open(image_path(folder, number)) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images)


def image_path(folder: Path, number: int) -> Path:
    """Name the file of an image."""
    return folder / f"{number:06d}.png"


def _missing(folder: Path, count: int) -> set[int]:
    """Find the numbers of images that are not there, by one listing of the folder."""
    there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    return {number for number in range(count) if image_path(folder, number).name not in there}


def _remove_partials(folder: Path, batches: Sequence[range]) -> None:
    """Remove what a killed process left half written of the images of this share."""
    own = {image_path(folder, number).name for batch in batches for number in batch}
    for partial in folder.glob(".*.png.*.partial"):
        if partial.name[1:].partition(".png")[0] + ".png" in own:
            partial.unlink(missing_ok=True)


def _description(share: Share) -> str:
    return "sampling" if share == WHOLE else f"sampling, part {share}"


def _locked(folder: Path, share: Share) -> AbstractContextManager[None]:
    """Hold a share of the folder for this process alone."""
    if share == WHOLE:
        return files.exclusive(folder)
    message = f"part {share} of {folder} is being made by another process; give each its own --part I/N, one N for all"
    return files.file_lock(folder / f".part-{share.number}-of-{share.of}.lock", message)


def _check_space(folder: Path, model: Model, images: int) -> None:
    """Refuse to start what the disk cannot hold; a PNG is not larger than its pixels, but for its head."""
    side = model.composite[TEXTURE_STREAM].grid * model.texture.downsample
    files.check_space(folder, images * (3 * side * side + 1024), "ask for fewer images")


def _left_open(model: Model, weak: Model | None, settings: SamplingConfig, images: int) -> dict[str, Any]:
    """Decide what the settings may leave open and a folder fixes."""
    decided = with_compile(settings, model, weak, images)
    size = settings.batch_size or fitting_batch_size(model, decided, weak, images)
    return {"batch_size": size, "compile": decided.compile}


def _claim(folder: Path, record: dict[str, Any], decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Write the record, or check that the one that is there says the same; give what was left open, as the folder is.

    Args:
        folder: of the samples.
        record: what the command asks for.
        decide: gives batch size and compilation, for a folder that is new.
    """
    path, record = folder / RECORD, files.jsonable(record)
    asked = record["sampling"]
    with _claiming(folder):
        if not path.exists():
            if any(folder.glob("*.png")):
                raise SFDError(f"{folder} holds images, but no {RECORD} that says what they are; give an empty folder")
            asked.update(decide())
            files.write_json(path, record)
        before = files.read_json(path, "folder of samples")
    recorded = before.get("sampling", {})
    asked["batch_size"] = asked["batch_size"] or recorded.get("batch_size")
    asked["compile"] = recorded.get("compile") if asked["compile"] == "auto" else asked["compile"]
    different = first_difference({name: before.get(name) for name in record}, record)
    if different is not None:
        field, then, now = different
        values = f"other {field}" if isinstance(now, list) else f"{field} = {then!r}, but this command has {now!r}"
        raise SFDError(f"{folder} holds samples made with {values}; give another --out folder, or remove that one")
    return {name: asked[name] for name in ("batch_size", "compile")}


@contextmanager
def _claiming(folder: Path) -> Iterator[None]:
    """Keep processes that start together from writing two records."""
    message = f"another process has been writing {folder / RECORD} for {SECONDS_FOR_OTHERS:.0f} s; is it stuck?"
    with files.file_lock(folder / ".claim.lock", message, wait=SECONDS_FOR_OTHERS):
        yield
