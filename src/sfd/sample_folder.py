"""Folders of samples: one PNG an image, numbered, and `samples.json`, which says how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfd import files
from sfd.errors import SFDError
from sfd.evaluation.figures import image_grid
from sfd.generate import SampleSettings, generate
from sfd.model import Model
from sfd.progress import bar

RECORD, GRID = "samples.json", "grid.png"


def write_samples(
    folder: Path,
    model: Model,
    labels: Sequence[int],
    seeds: Sequence[int],
    settings: SampleSettings,
    *,
    weak: Model | None = None,
) -> None:
    """Sample image i with labels[i] and seeds[i] into `folder/{i:06d}.png`; images that are there are not made again.

    Raises:
        SFDError: the folder holds samples made otherwise.
    """
    record = {
        "model": model.identity,
        "weak": weak.identity if weak else None,
        # The batch size does not change an image.
        "sampling": settings.model_dump(mode="json", exclude={"batch_size"}) | {"steps": settings.resolved_steps},
        "classes": list(model.classes),
        "labels": list(labels) if model.classes else [],
        "seeds": list(seeds),
    }
    missing = [i for i in range(len(seeds)) if not image_path(folder, i).exists()]
    chosen_labels, chosen_seeds = [labels[i] for i in missing], [seeds[i] for i in missing]
    batches = generate(model, chosen_labels, chosen_seeds, settings, weak=weak)  # refuses what makes no sense
    _claim(folder, record)
    with bar("sampling", len(seeds), len(seeds) - len(missing)) as shown:
        for batch in batches:
            for offset, image in enumerate(batch.images):
                with files.written(image_path(folder, missing[batch.first + offset])) as partial:
                    Image.fromarray(image).save(partial, "PNG")
            shown.advance(len(batch.images))


def write_grid(folder: Path, numbers: Sequence[int], columns: int) -> None:
    """Show some images of a folder as one picture, `grid.png`."""
    with files.written(folder / GRID) as partial:
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


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Write the record, or check that the one that is there says the same."""
    path = folder / RECORD
    if not path.exists():
        if any(folder.glob("*.png")):
            raise SFDError(f"{folder} holds images, but no {RECORD} that says what they are; give an empty folder")
        files.write_json(path, record)
        return
    before = files.read_json(path, "folder of samples")
    for field, value in files.plain(record).items():
        if before.get(field) != value:
            raise SFDError(
                f"{folder} holds samples made with another {field} than this command's; "
                "give another --out folder, or remove that one"
            )
