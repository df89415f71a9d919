"""Images from a folder or a zip archive, checked and read; and a data set written out as such a folder."""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from sfd.data.cache import BUDGET, map_ranges, nbytes
from sfd.data.images import NO_IMAGE, ImageSource, Indices, decode, read_image, stable_hash
from sfd.data.listing import UNREADABLE, ImageFiles, meant_as_image, nfc, shown
from sfd.utils.errors import SFDError
from sfd.utils.files import as_user_error, check_replaceable, file_lock, write_text

_NAMED = 5  # names in a message

Found = list[int | str]  # per file: the CRC-32 of its bytes, or the reason why it cannot be used

logger = logging.getLogger(__name__)


class FolderSource:
    """The images of a folder or a zip archive; `sfd.data.listing` says which they are, and of what class.

    Opening checks every file by decoding it. What cannot be used is skipped with a warning: damaged images, classes
    without an image.

    Args:
        path: the folder or the archive.
        image_size: images are scaled and centre-cropped to this; None: all must be squares of one size, as samples are.
        strict: refuse what would be skipped.
        budget: bytes of decoded images that the check may keep, so that nothing is decoded twice.
        memory: a file that remembers what a check found. It is used while all files have the sizes and modification
            times that they had. Of several processes with one memory, the first checks and the others wait for it.

    Attributes:
        names: the images' names by index, relative to the folder that holds the classes.
        skipped: (name, reason) of every file that cannot be used; messages name the first few.
        identity: a hash of the names, sizes and CRC-32 checksums of the images used; the same for a folder, wherever
            it is, and its zip.
    """

    def __init__(
        self,
        path: Path | str,
        image_size: int | None,
        *,
        strict: bool = False,
        budget: int = BUDGET,
        memory: Path | None = None,
    ) -> None:
        if image_size is not None and image_size < 1:
            raise SFDError(f"image_size is {image_size}, but an image has at least 1 pixel; give a larger one")
        self._files = ImageFiles(path)
        self.path = self._files.path
        self._exact = image_size is None
        self.image_size = self._own_size() if image_size is None else image_size
        self._pixels: np.ndarray | None = None
        found = self._check(budget) if memory is None else self._remembered(memory, budget)
        self._select(found)
        self._report(strict or self._exact)

    def _own_size(self) -> int:
        for name in self._files.names:
            try:
                return min(read_image(self._files.read(name)).shape[:2])
            except SFDError:
                continue
        return 1  # there is no image; said later

    def _remembered(self, memory: Path, budget: int) -> Found:
        """Recall what an earlier check found, or check and write it down."""
        seen = {"image_size": self.image_size, "files": self._files.fingerprint()}
        with file_lock(memory.with_name(f".{memory.name}.lock"), "", wait=-1):
            found = _recalled(memory, seen, len(self._files.names))
            if found is None:
                found = self._check(budget)
                write_text(memory, json.dumps({"seen": seen, "found": found}) + "\n")
                return found
        # A reader's failure may be over: a disk that was away, permissions.
        again = {row for row, result in enumerate(found) if str(result).startswith(UNREADABLE)}
        return [self._check_file(name)[0] if row in again else found[row] for row, name in enumerate(self._files.names)]

    def _check(self, budget: int) -> Found:
        """Decode all files, and keep their pixels if they fit in `budget` bytes."""
        names, size = self._files.names, self.image_size
        keep = nbytes(len(names), size) <= budget
        pixels = np.empty((len(names) if keep else 0, size, size, 3), np.uint8)

        def check(rows: range) -> Found:
            found: Found = []
            for row in rows:
                result, image = self._check_file(names[row])
                found.append(result)
                if keep and image is not None:
                    pixels[row] = image
            return found

        found = [result for part in map_ranges("Checking images", len(names), check) for result in part]
        self._pixels = pixels if keep else None
        return found

    def _check_file(self, name: str) -> tuple[int | str, np.ndarray | None]:
        """Decode a file: the CRC-32 of its bytes and the image, or why it cannot be used and None."""
        try:
            data = self._files.read(name)
            return zlib.crc32(data), decode(data, self.image_size, exact=self._exact)
        except SFDError as error:
            return str(error), None

    def _select(self, found: Found) -> None:
        """Set everything to the files that can be used, and the classes that have one."""
        files = self._files
        usable = [row for row, result in enumerate(found) if isinstance(result, int)]
        self._rows = np.array(usable, np.int64)
        self.names = [files.names[row] for row in usable]
        self.skipped, self._side = list(files.skipped), list(files.side)
        for name, reason in zip(files.names, found, strict=True):
            if reason == NO_IMAGE and not meant_as_image(name):
                self._side.append(files.root + name)
            elif isinstance(reason, str):
                self.skipped.append((files.root + name, reason))
        labels = np.array([files.labels[row] for row in usable], np.int64)
        used = np.unique(labels) if files.classes else np.arange(0)
        self.classes = tuple(files.classes[label] for label in used)
        self.labels = np.searchsorted(used, labels) if files.classes else labels
        self._empty = [*files.empty, *(name for name in files.classes if name not in self.classes)]
        self.identity = stable_hash(
            "images",
            image_size=self.image_size,
            classes=self.classes,
            files=[(nfc(files.names[row]), files.size(files.names[row]), found[row]) for row in usable],
        )

    def _report(self, strict: bool) -> None:
        """Report what is left out, or refuse it."""
        total = len(self.names) + len(self.skipped)
        some = _some([f"{shown(name)}: {reason}" for name, reason in self.skipped])
        empty = _some([repr(shown(name)) for name in self._empty])
        if self.skipped and strict:
            raise SFDError(
                f"{self.path}: {len(self.skipped)} of {total} files cannot be used ({some}); mend or remove them, or "
                + ("scale all images to one size (sfd evaluate --image-size)" if self._exact else "leave strict off")
            )
        if not self.names:
            why = some or ", ".join(self._kinds())
            raise SFDError(
                f"{self.path} holds no readable image{f' ({why})' if why else ''}; give a folder or zip of images"
            )
        if self._empty and strict:
            raise SFDError(f"{self.path}: no readable image in {empty}; add images, remove them, or leave strict off")
        if self.skipped:
            logger.warning("%s: skipped %d of %d files (%s)", self.path, len(self.skipped), total, some)
        if self._empty:
            logger.warning("%s: left out folders without a readable image: %s", self.path, empty)
        if self._side:
            logger.warning("%s: ignored files that are no images: %s", self.path, _some(self._kinds()))

    def _kinds(self) -> list[str]:
        """Count the side files by suffix."""
        kinds = Counter(PurePosixPath(name).suffix.lower() or "without suffix" for name in self._side)
        return [f"{count} {shown(kind)}" for kind, count in kinds.most_common()]

    @property
    def resident(self) -> bool:
        """Whether the decoded images are in memory."""
        return self._pixels is not None

    def __len__(self) -> int:
        return len(self.names)

    def load(self, indices: Indices) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, S, S, 3)."""
        indices = np.asarray(indices, dtype=np.int64)
        if self._pixels is not None:
            return self._pixels[self._rows[indices]]
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for row, index in enumerate(indices):
            try:
                images[row] = decode(self._files.read(self.names[index]), self.image_size)
            except SFDError as error:
                name = shown(self.names[index])
                raise SFDError(f"{self.path}: {name} changed since it was checked: {error}") from None
        return images


def _some(items: list[str]) -> str:
    more = f"; and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return "; ".join(items[:_NAMED]) + more


def _recalled(memory: Path, seen: dict[str, Any], count: int) -> Found | None:
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        found = record["found"] if record["seen"] == seen else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: everything is checked again
    return found if isinstance(found, list) and len(found) == count else None


def skipped_report(source: ImageSource) -> str:
    """List every file that a source skipped, one per line: its name, a tab and the reason. "" where none was."""
    skipped = source.skipped if isinstance(source, FolderSource) else []
    return "".join(f"{shown(name)}\t{shown(reason)}\n" for name, reason in skipped)


def write_folder(source: ImageSource, path: Path | str) -> None:
    """Write a data set as PNGs that FolderSource reads back exactly: one sub-folder per class, none without classes."""
    path = Path(path)
    check_replaceable(path)
    folders = [path / name for name in source.classes] or [path]

    def write(rows: range) -> None:
        for index, image in zip(rows, source.load(rows), strict=True):
            Image.fromarray(image).save(folders[source.labels[index]] / f"{index:06d}.png")

    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        map_ranges("Writing images", len(source), write)
    except OSError as error:
        raise as_user_error(error, path) from error
