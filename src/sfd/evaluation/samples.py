"""Folders of generated images, as evaluation reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from sfd import files
from sfd.errors import SFDError, unknown


@dataclass(frozen=True)
class Samples:
    """Generated images on disk, with what is known of how they were made."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None  # one an image, into `classes`; None if the images have no class
    classes: tuple[str, ...]  # class names; () if none
    sampling: dict[str, Any]  # solver, steps, guidance … ; empty if not recorded
    model: str  # identity of the model; empty if not recorded

    def batches(self, size: int = 256) -> Iterator[np.ndarray]:
        """Read the images, uint8 (at most `size`, S, S, 3) at a time.

        Raises:
            SFDError: a file is no image, or of another size than the first.
        """
        expected: tuple[int, ...] | None = None
        for start in range(0, len(self.paths), size):
            batch = [_read(path) for path in self.paths[start : start + size]]
            expected = expected or batch[0].shape
            for path, image in zip(self.paths[start:], batch, strict=False):
                if image.shape != expected:
                    raise SFDError(
                        f"{path} is {image.shape[1]}×{image.shape[0]} pixels, the images before it are "
                        f"{expected[1]}×{expected[0]}; evaluate images of one size at a time"
                    )
            yield np.stack(batch)

    def labels_among(self, classes: Sequence[str]) -> np.ndarray | None:
        """Give the labels (N,) as indices into another list of class names.

        Raises:
            SFDError: an image is of a class that the list does not have.
        """
        if self.labels is None or not classes:
            return None
        for name in {self.classes[label] for label in self.labels}:
            if name not in classes:
                raise unknown("class", name, classes)
        return np.array([list(classes).index(self.classes[label]) for label in self.labels], dtype=np.int64)


def load_samples(folder: Path) -> Samples:
    """Find the PNG images of a folder.

    With a `samples.json` beside them (as `sfd sample` writes it: "labels" one an image in file order, "classes" the
    names that labels index, "sampling", "model") that says what they are; else each sub-folder is a class; else the
    images have no class.

    Raises:
        SFDError: there is no image, or `samples.json` does not fit the images.
    """
    if not folder.is_dir():
        raise SFDError(f"there is no folder {folder}; give one with PNG images, such as `sfd sample` writes")
    if (folder / "samples.json").is_file():
        return _with_manifest(folder, files.read_json(folder / "samples.json", "folder of samples"))
    paths = sorted(folder.glob("*.png")) or sorted(folder.glob("*/*.png"))
    if not paths:
        raise SFDError(f"{folder} holds no PNG image, neither at its top nor in class folders; sample some first")
    if paths[0].parent == folder:
        return Samples(tuple(paths), None, (), {}, "")
    classes = tuple(sorted({path.parent.name for path in paths}))
    labels = tuple(classes.index(path.parent.name) for path in paths)
    return Samples(tuple(paths), labels, classes, {}, "")


def _with_manifest(folder: Path, manifest: dict[str, Any]) -> Samples:
    where = folder / "samples.json"
    labels = [int(label) for label in manifest.get("labels") or ()]
    classes = tuple(str(name) for name in manifest.get("classes") or ())
    paths = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
    if not paths:
        raise SFDError(f"{folder} has a samples.json but no numbered PNG image (000000.png, …); sample again")
    if classes and len(labels) != len(paths):
        raise SFDError(f"{where} lists {len(labels)} labels for {len(paths)} images; sample again into an empty folder")
    if classes and not all(0 <= label < len(classes) for label in labels):
        raise SFDError(f"{where} has labels outside of its {len(classes)} classes; sample again into an empty folder")
    return Samples(
        tuple(paths),
        tuple(labels) if classes else None,
        classes,
        dict(manifest.get("sampling") or {}),
        str(manifest.get("model") or ""),
    )


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise SFDError(f"{path} cannot be read as an image ({error}); sample it again") from None
