"""Generated images as evaluation reads them: a folder of `sfd sample`, any folder or zip of images, or an `.npz`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from sfd.data.classes import find_class
from sfd.data.folder import FolderSource
from sfd.data.images import Images, Indices, decode, read_image, stable_hash
from sfd.evaluation.evaluate import balanced
from sfd.evaluation.npz import IMAGES, LABELS, RECORD, Npz, NpzImages, read_labels
from sfd.utils import files
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar

BATCH = 256


class NumberedImages:
    """The images 000000.png, 000001.png, … of a folder that `sfd sample` wrote, in the order of their numbers."""

    def __init__(self, folder: Path) -> None:
        paths = [path for path in folder.glob("*.png") if path.stem.isdigit()]
        if not paths:
            raise SFDError(f"{folder} has a {RECORD} but no numbered PNG image (000000.png, …); sample again")
        self.paths = sorted(paths, key=lambda path: int(path.stem))
        self.image_size = min(read_image(self.paths[0].read_bytes()).shape[:2])

    @cached_property
    def identity(self) -> str:
        """Hash of the files' names and bytes; reads them all."""
        contents = []
        with bar("checksums of the images", len(self)) as shown:
            for path in self.paths:
                data = path.read_bytes()
                contents.append((path.name, len(data), zlib.crc32(data)))
                shown.update()
        return stable_hash("png", files=contents)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Indices) -> np.ndarray:
        """Return images as uint8 (B, S, S, 3)."""
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for row, index in enumerate(indices):
            try:
                images[row] = decode(self.paths[index].read_bytes(), self.image_size, exact=True)
            except SFDError as error:
                raise SFDError(f"{self.paths[index]}: {error}; remove it, and sample it again") from None
        return images


@dataclass(frozen=True)
class Samples:
    """Generated images on disk, with the record of how they were made."""

    images: Images
    labels: tuple[int, ...] | None  # one per image, into `classes`; None if the images have no class
    classes: tuple[str, ...]  # class names; () if none
    record: dict[str, Any] = field(default_factory=dict)  # `samples.json`; empty if there was none

    @property
    def sampling(self) -> dict[str, Any]:
        """Solver, steps, guidance, model, seeds …; empty if not recorded."""
        known = dict(self.record.get("sampling") or {})
        for name in ("model", "guiding"):
            if self.record.get(name):
                known[name] = str(self.record[name])
        if self.record.get("seeds"):
            known["seeds"] = _ranges([int(seed) for seed in self.record["seeds"]])
        return known

    @property
    def balanced(self) -> bool:
        """Whether every class has equally many images, or one more; False where nothing says what classes there are."""
        known = self.labels is not None or "classes" in self.record
        return known and balanced(self.labels, len(self.classes))

    def labels_among(self, classes: Sequence[str]) -> np.ndarray | None:
        """Give the labels (N,) as indices into another list of class names, which must have all of them."""
        if self.labels is None or not classes:
            return None
        found = {label: find_class(self.classes[label], classes) for label in set(self.labels)}
        return np.array([found[label] for label in self.labels], dtype=np.int64)


def load_samples(path: Path, image_size: int | None = None) -> Samples:
    """Open samples.

    Args:
        path: an `.npz` (`arr_0` images, `arr_1` classes); a folder with `samples.json` ("labels" one per image,
            "classes" the names that labels index, "sampling", "model", "seeds"); or a folder or zip of images as
            training reads them, where each sub-folder is a class.
        image_size: scale and crop the images of a folder or zip to this, as for training; None: they must be square
            and of one size.
    """
    if path.suffix == ".npz":
        return _packed(Npz(path))
    if (path / RECORD).is_file():
        return _recorded(path, files.read_json(path / RECORD, "folder of samples"))
    inside = sorted(record.parent for record in path.glob(f"*/{RECORD}"))
    if inside:
        raise SFDError(f"{path} holds several folders of samples; give one, such as {inside[0]}")
    source = FolderSource(path, image_size)
    labels = tuple(source.labels.tolist()) if source.classes else None
    return Samples(source, labels, source.classes)


def pack(samples: Samples, out: Path) -> None:
    """Write samples as an `.npz` in ADM's format, in one pass over them: `arr_0`, `arr_1` and `samples.json`.

    The archive is not compressed, so that any part of it can be read at once. It holds no dates: equal samples make
    equal archives.
    """
    images, record = samples.images, {name: value for name, value in samples.record.items() if name != "labels"}
    shape = (len(images), images.image_size, images.image_size, 3)
    with files.atomic_write(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(zipfile.ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as stream:
            npy.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": "|u1"})
            with bar("packing", len(images)) as shown:
                for start in range(0, len(images), BATCH):
                    batch = images.load(range(start, min(start + BATCH, len(images))))
                    stream.write(np.ascontiguousarray(batch).data)
                    shown.update(len(batch))
        if samples.labels is not None:
            with archive.open(zipfile.ZipInfo(f"{LABELS}.npy"), "w") as stream:
                npy.write_array(stream, np.asarray(samples.labels, "<i8"), allow_pickle=False)
            record["classes"] = list(samples.classes)
        archive.writestr(zipfile.ZipInfo(RECORD), files.to_json(record))


def _packed(npz: Npz) -> Samples:
    images, record = NpzImages(npz), npz.record()
    labels = read_labels(npz, len(images))
    if labels is None:
        return Samples(images, None, (), record)
    classes = tuple(str(name) for name in record.get("classes") or range(int(labels.max()) + 1))
    if labels.max() >= len(classes):
        raise SFDError(f"{npz.path}: {LABELS} has classes beyond the {len(classes)} of its {RECORD}; pack it again")
    return Samples(images, tuple(labels.tolist()), classes, record)


def _recorded(folder: Path, record: dict[str, Any]) -> Samples:
    labels = [int(label) for label in record.get("labels") or ()]
    classes = tuple(str(name) for name in record.get("classes") or ())
    images = NumberedImages(folder)
    expected = len(record.get("seeds") or images.paths)
    if len(images) < expected:
        raise SFDError(
            f"{folder} has {len(images)} of its {expected} images; the same `sfd sample` command makes the others"
        )
    if not classes:
        return Samples(images, None, (), record)
    if len(labels) != len(images) or not all(0 <= label < len(classes) for label in labels):
        raise SFDError(
            f"{folder / RECORD} lists {len(labels)} labels among {len(classes)} classes for {len(images)} images, but "
            "each image needs the label of a class; sample again into an empty folder"
        )
    return Samples(images, tuple(labels), classes, record)


def _ranges(numbers: list[int]) -> str:
    """Write the distinct numbers as ranges: "0-49", "1, 5-7"."""
    ordered = np.unique(numbers)
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
