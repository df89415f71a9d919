"""Generated images, as evaluation reads them: a folder of PNGs or an `.npz`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.lib import format as npy
from PIL import Image, UnidentifiedImageError

from sfd.data.classes import find_class
from sfd.data.images import Indices, stable_hash
from sfd.evaluation.npz import IMAGES, LABELS, RECORD, Npz, NpzImages, read_labels
from sfd.utils import files
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar


class Images(Protocol):
    """Square images of one size, read a range at a time."""

    image_size: int

    @property
    def identity(self) -> str:
        """Hash of what the images are."""

    def __len__(self) -> int: ...

    def load(self, indices: Indices) -> np.ndarray:
        """Return successive images as uint8 (B, S, S, 3)."""


class PngImages:
    """Image files, square and of one size.

    Raises:
        SFDError: the first file is no image, or not square.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.image_size, width = _read(self.paths[0]).shape[:2]
        if width != self.image_size:
            raise SFDError(f"{self.paths[0]} is {width}×{self.image_size} pixels, but evaluation takes square images")

    @cached_property
    def identity(self) -> str:
        """Hash of the files' names and bytes; reads them all."""
        contents = []
        with bar("checksums of the images", len(self)) as shown:
            for path in self.paths:
                data = path.read_bytes()
                contents.append((path.name, len(data), zlib.crc32(data)))
                shown.advance()
        return stable_hash("png", files=contents)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Indices) -> np.ndarray:
        """Return images as uint8 (B, S, S, 3).

        Raises:
            SFDError: a file is no image, or of another size than the first.
        """
        size = self.image_size
        images = np.empty((len(indices), size, size, 3), np.uint8)
        for row, index in enumerate(indices):
            image = _read(self.paths[index])
            if image.shape[:2] != (size, size):
                raise SFDError(
                    f"{self.paths[index]} is {image.shape[1]}×{image.shape[0]} pixels, the first image is "
                    f"{size}×{size}; evaluate images of one size at a time"
                )
            images[row] = image
        return images


@dataclass(frozen=True)
class Samples:
    """Generated images on disk, with what is known of how they were made."""

    images: Images
    labels: tuple[int, ...] | None  # one an image, into `classes`; None if the images have no class
    classes: tuple[str, ...]  # class names; () if none
    record: dict[str, Any] = field(default_factory=dict)  # `samples.json`; empty if there was none

    @property
    def sampling(self) -> dict[str, Any]:
        """Solver, steps, guidance, model, seeds …; empty if not recorded."""
        known = dict(self.record.get("sampling") or {})
        for name in ("model", "weak"):
            if self.record.get(name):
                known[name] = str(self.record[name])
        if self.record.get("seeds"):
            known["seeds"] = _ranges([int(seed) for seed in self.record["seeds"]])
        return known

    @property
    def balanced(self) -> bool:
        """Whether every class has equally many images, or one more; False where nothing says what classes there are."""
        known = self.labels is not None or "classes" in self.record
        return known and balanced(None if self.labels is None else np.asarray(self.labels), len(self.classes))

    def batches(self, size: int = 256) -> Iterator[np.ndarray]:
        """Read the images, uint8 (at most `size`, S, S, 3) at a time.

        Raises:
            SFDError: a file is no image, or of another size than the first.
        """
        for start in range(0, len(self.images), size):
            yield self.images.load(range(start, min(start + size, len(self.images))))

    def labels_among(self, classes: Sequence[str]) -> np.ndarray | None:
        """Give the labels (N,) as indices into another list of class names.

        Raises:
            SFDError: an image is of a class that the list does not have.
        """
        if self.labels is None or not classes:
            return None
        found = {label: find_class(self.classes[label], classes) for label in set(self.labels)}
        return np.array([found[label] for label in self.labels], dtype=np.int64)


def balanced(labels: np.ndarray | None, classes: int) -> bool:
    """Whether each of so many classes has equally many images, or one more; without labels, whether there is one."""
    if labels is None:
        return classes <= 1
    counts = np.bincount(labels, minlength=classes)
    return int(counts.max() - counts.min()) <= 1


def load_samples(path: Path) -> Samples:
    """Find the images of an `.npz` or the PNG images of a folder.

    With a `samples.json` in it (as `sfd sample` and `sfd pack` write it: "labels" one an image in file order, "classes"
    the names that labels index, "sampling", "model", "seeds") that says what they are; else each sub-folder, or each
    number in the archive's `arr_1`, is a class; else the images have no class.

    Raises:
        SFDError: there is no image, or `samples.json` does not fit the images.
    """
    if path.is_file():
        return _packed(Npz(path))
    if not path.is_dir():
        raise SFDError(f"there is no folder or .npz {path}; give one with PNG images, such as `sfd sample` writes")
    if (path / RECORD).is_file():
        return _with_record(path, files.read_json(path / RECORD, "folder of samples"))
    paths = sorted(path.glob("*.png")) or sorted(path.glob("*/*.png"))
    if not paths:
        raise SFDError(f"{path} holds no PNG image, neither at its top nor in class folders; sample some first")
    if paths[0].parent == path:
        return Samples(PngImages(paths), None, ())
    classes = tuple(sorted({path.parent.name for path in paths}))
    labels = tuple(classes.index(path.parent.name) for path in paths)
    return Samples(PngImages(paths), labels, classes)


def pack(samples: Samples, out: Path) -> None:
    """Write samples as an `.npz` in ADM's format, in one pass over them: `arr_0`, `arr_1` and `samples.json`.

    The archive is not compressed, so that any part of it can be read at once, and is either whole or not there.
    """
    images = samples.images
    with (
        files.atomic_write(out) as partial,
        zipfile.ZipFile(partial, "w") as archive,
        bar("packing", len(images)) as shown,
    ):
        with _member(archive, IMAGES, (len(images), images.image_size, images.image_size, 3), "|u1") as stream:
            for batch in samples.batches():
                stream.write(np.ascontiguousarray(batch).data)
                shown.advance(len(batch))
        if samples.labels is not None:
            with _member(archive, LABELS, (len(images),), "<i8") as stream:
                stream.write(np.asarray(samples.labels, "<i8").tobytes())
        record = {name: value for name, value in samples.record.items() if name != "labels"}  # they are in `arr_1`
        if samples.labels is not None:
            record["classes"] = list(samples.classes)
        archive.writestr(zipfile.ZipInfo(RECORD), files.to_json(record))


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], descr: str) -> IO[bytes]:
    # A ZipInfo carries no date, so that equal samples make equal archives.
    stream = archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
    npy.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": descr})
    return stream


def _packed(npz: Npz) -> Samples:
    images, record = NpzImages(npz), npz.record()
    labels = read_labels(npz, len(images))
    if labels is None:
        return Samples(images, None, (), record)
    classes = tuple(str(name) for name in record.get("classes") or range(int(labels.max()) + 1))
    if labels.max() >= len(classes):
        raise SFDError(f"{npz.path}: {LABELS} has classes beyond the {len(classes)} of its {RECORD}; pack it again")
    return Samples(images, tuple(labels.tolist()), classes, record)


def _with_record(folder: Path, record: dict[str, Any]) -> Samples:
    where = folder / RECORD
    labels = [int(label) for label in record.get("labels") or ()]
    classes = tuple(str(name) for name in record.get("classes") or ())
    paths = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
    if not paths:
        raise SFDError(f"{folder} has a samples.json but no numbered PNG image (000000.png, …); sample again")
    expected = len(record.get("seeds") or paths)
    if len(paths) < expected:
        raise SFDError(
            f"{folder} has {len(paths)} of its {expected} images; the same `sfd sample` command makes the others"
        )
    if classes and len(labels) != len(paths):
        raise SFDError(f"{where} lists {len(labels)} labels for {len(paths)} images; sample again into an empty folder")
    if classes and not all(0 <= label < len(classes) for label in labels):
        raise SFDError(f"{where} has labels outside of its {len(classes)} classes; sample again into an empty folder")
    return Samples(PngImages(paths), tuple(labels) if classes else None, classes, record)


def _ranges(numbers: list[int]) -> str:
    """Write the distinct numbers as ranges: "0-49", "1, 5-7"."""
    ordered, parts = sorted(set(numbers)), []
    starts = [i for i, n in enumerate(ordered) if i == 0 or n != ordered[i - 1] + 1]
    for start, end in zip(starts, [*starts[1:], len(ordered)], strict=True):
        first, last = ordered[start], ordered[end - 1]
        parts.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join(parts)


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise SFDError(f"{path} cannot be read as an image ({error}); sample it again") from None
