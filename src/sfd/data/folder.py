"""Images from a folder or a zip archive, a sub-folder a class; and a data set written out as such a folder."""

from __future__ import annotations

import json
import logging
import os
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sfd.data.cache import BUDGET, nbytes
from sfd.data.images import ImageSource, Indices, decode, read_image, stable_hash
from sfd.utils.errors import SFDError
from sfd.utils.files import as_user_error, write_text
from sfd.utils.progress import bar

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# A larger file is no picture that training could want, but several at once could fill the memory.
_MAX_BYTES = 2**28
# Links to folders on the way to a file: among folders that link to one another there are ways without number.
_MAX_LINKS = 2
_CHUNK = 256
_NAMED = 5  # broken files named in a message; all are in `skipped`


class FolderSource:
    """A folder or a zip archive of images, a sub-folder (with all below it) a class, or images alone: unconditional.

    Opening checks every file by decoding it, and keeps the pixels if all fit in `budget` bytes, so that nothing is
    decoded twice. Hidden files are passed over. An archive whose content lies in one folder is opened at that folder.

    Args:
        path: the folder or the archive.
        image_size: images are scaled and centre-cropped to this; None: all must be squares of one size, as samples are.
        strict: refuse broken files in place of skipping them.
        budget: bytes of decoded images that may be kept.
        memory: a file that remembers a check that found every image whole. It is believed while all files have the
            sizes and times of change that they had, unless pixels are kept, for which all are decoded anyway.

    Attributes:
        names: the images' names, relative to the folder, by index.
        skipped: (name, reason) of every file that cannot be used; messages name the first few.
        identity: a hash of the names, sizes and CRC-32 checksums of the images used; the same for a folder and its zip.

    Raises:
        SFDError: no such folder, nothing in it, images both beside and inside class folders, a class without an image,
            or any broken file under `strict`.
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
        self.path = Path(path)
        self._files = _open_files(self.path)
        self._pixels: np.ndarray | None = None
        names, folders, self.skipped = _layout(self.path, sorted(self._files.sizes), self._files.folders)
        self._exact = image_size is None
        self.image_size = image_size = self._own_size(names) if image_size is None else image_size
        keep = nbytes(len(names), image_size) <= budget
        seen = {"image_size": image_size, "files": self._files.fingerprint()}
        found = _recalled(memory, seen, len(names)) if memory and not keep else None
        if found is None:
            found = self._check(names, keep)
            if memory and not keep and not any(isinstance(result, str) for result in found):
                write_text(memory, json.dumps({"seen": seen, "checksums": found}) + "\n", shared=True)
        crcs = self._sort(names, found)
        self._report(strict or self._exact)
        self._label(folders)
        self.identity = stable_hash(
            "images",
            image_size=image_size,
            classes=self.classes,
            files=[(name, self._files.sizes[name], crc) for name, crc in zip(self.names, crcs, strict=True)],
        )

    def _sort(self, names: list[str], found: list[int | str]) -> list[int]:
        """Set `names` and the pixels' rows to the files that are whole, and give their CRC-32."""
        self.skipped += [(name, why) for name, why in zip(names, found, strict=True) if isinstance(why, str)]
        whole = {row: crc for row, crc in enumerate(found) if isinstance(crc, int)}
        self._rows = np.array(list(whole), np.int64)
        self.names = [names[row] for row in whole]
        return list(whole.values())

    def _own_size(self, names: list[str]) -> int:
        for name in names:
            try:
                return min(read_image(self._read(name)).shape[:2])
            except SFDError:
                continue
        return 1  # there is no image; said below

    def _check(self, names: list[str], keep: bool) -> list[int | str]:
        """Decode all files, and keep their pixels if asked to; give each one's CRC-32, or the reason to skip it."""
        pixels = np.empty((len(names) if keep else 0, self.image_size, self.image_size, 3), np.uint8)

        def check(rows: range) -> list[int | str]:
            """Decode the files of some rows; returns each's checksum, or the reason to skip it."""
            found: list[int | str] = []
            for row in rows:
                try:
                    data = self._read(names[row])
                    image = decode(data, self.image_size, exact=self._exact)
                except SFDError as error:
                    found.append(str(error))
                    continue
                found.append(zlib.crc32(data))
                if keep:
                    pixels[row] = image
            return found

        chunks = [range(start, min(start + _CHUNK, len(names))) for start in range(0, len(names), _CHUNK)]
        found: list[int | str] = []
        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            with bar("Checking images", len(names)) as progress:
                for step in pool.map(check, chunks):
                    found += step
                    progress.advance(len(step))
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt need not wait for the rest
        self._pixels = pixels if keep else None
        return found

    def _report(self, strict: bool) -> None:
        """Name the skipped files, or refuse them."""
        total = len(self.names) + len(self.skipped)
        some = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:_NAMED])
        more = f"; and {len(self.skipped) - _NAMED} more" if len(self.skipped) > _NAMED else ""
        if self.skipped and strict:
            raise SFDError(
                f"{self.path}: {len(self.skipped)} of {total} files cannot be used ({some}{more}); "
                "mend or remove them, or leave strict off to skip them"
            )
        if not self.names:
            why = f" ({some}{more})" if some else ""
            raise SFDError(f"{self.path} holds no readable image{why}; give a folder or zip of images")
        if self.skipped:
            message = "%s: skipped %d of %d files (%s%s)"
            logging.getLogger(__name__).warning(message, self.path, len(self.skipped), total, some, more)

    def _label(self, folders: list[str]) -> None:
        """Set `classes` and `labels` from the class folders, each of which must hold an image."""
        self.classes = tuple(folders)
        if not folders:
            self.labels = np.zeros(len(self.names), np.int64)
            return
        number = {folder: label for label, folder in enumerate(folders)}
        self.labels = np.array([number[PurePosixPath(name).parts[0]] for name in self.names], np.int64)
        missing = [folders[label] for label in np.flatnonzero(np.bincount(self.labels, minlength=len(folders)) == 0)]
        if missing:
            raise SFDError(
                f"{self.path}: class folder {missing[0]!r} holds no readable image"
                f"{f' (nor do {len(missing) - 1} others)' if missing[1:] else ''}; add images or remove the folder"
            )

    def _read(self, name: str) -> bytes:
        if self._files.sizes[name] > _MAX_BYTES:
            raise SFDError(f"the file is larger than {_MAX_BYTES:,} bytes")
        try:
            return self._files.read(name)
        except Exception as error:  # Decompressors meet damaged archives with errors of nearly every type.
            raise SFDError(f"cannot be read ({error})") from None

    @property
    def resident(self) -> bool:
        """Whether the decoded images are in memory."""
        return self._pixels is not None

    def __len__(self) -> int:
        return len(self.names)

    def load(self, indices: Indices) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, S, S, 3).

        Raises:
            SFDError: a file that was whole when the folder was opened no longer is.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if self._pixels is not None:
            return self._pixels[self._rows[indices]]
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for row, index in enumerate(indices):
            try:
                images[row] = decode(self._read(self.names[index]), self.image_size)
            except SFDError as error:
                raise SFDError(f"{self.path}: {self.names[index]} changed since it was checked: {error}") from None
        return images


def skipped_report(source: ImageSource) -> str:
    """List every file that a source skipped, a line each: its name, a tab and the reason. "" where none was skipped."""
    skipped = source.skipped if isinstance(source, FolderSource) else []
    return "".join(f"{name}\t{reason}\n" for name, reason in skipped)


class _Files(Protocol):
    """Where files come from: names are relative, with forward slashes."""

    sizes: dict[str, int]  # of every file, in bytes, by name
    folders: set[str]  # at the top, empty ones among them

    def read(self, name: str) -> bytes: ...

    def fingerprint(self) -> str:
        """Hash what tells whether a file has changed."""


def _recalled(memory: Path, seen: dict[str, Any], count: int) -> list[int | str] | None:
    """Give the checksums of a check that found every image whole, if nothing has changed since."""
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        checksums = record["checksums"] if record["seen"] == seen else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or damaged: then all is checked and written anew
    return checksums if isinstance(checksums, list) and len(checksums) == count else None


def _open_files(path: Path) -> _Files:
    if path.is_dir():
        return _Directory(path)
    if zipfile.is_zipfile(path):
        return _Archive(path)
    if path.exists():
        raise SFDError(f"{path} is neither a folder nor a zip archive; give one that holds images")
    raise SFDError(f"there is no {path}; give a folder or a zip archive of images (in a recipe: data.source)")


class _Directory:
    """Files below a folder; links are followed, but never in a circle, nor more than a few on one way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        self._changed: dict[str, int] = {}
        try:
            self.folders = {entry.name for entry in os.scandir(path) if entry.is_dir() and not _hidden(entry.name)}
            self._scan(str(path), "", (os.path.realpath(path),))
        except OSError as error:
            raise SFDError(
                f"{error.filename or path} cannot be listed ({error.strerror}); give a readable one"
            ) from None

    def _scan(self, folder: str, prefix: str, above: tuple[str, ...], links: int = 0) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _hidden(entry.name):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    further = links + entry.is_symlink()
                    if real not in above and further <= _MAX_LINKS:
                        self._scan(entry.path, f"{prefix}{entry.name}/", (*above, real), further)
                elif entry.is_file():
                    status = entry.stat()
                    self.sizes[prefix + entry.name] = status.st_size
                    self._changed[prefix + entry.name] = status.st_mtime_ns
                elif entry.is_symlink():  # to nothing, or to no file: reading it will say so
                    self.sizes[prefix + entry.name] = 0

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def fingerprint(self) -> str:
        return stable_hash("folder", sizes=self.sizes, changed=self._changed)


class _Archive:
    """Members of a zip archive, read when asked for.

    One handle serves all threads, for the zipfile module locks every read; a forked process opens its own, since it
    would share the file's position with its parent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._handle = self._open()
        self._owner = os.getpid()
        members, folders = {}, set()
        for member in self._handle.infolist():
            parts = PurePosixPath(member.filename).parts
            if member.filename.startswith("/") or ".." in parts:
                raise SFDError(f"{path}: member {member.filename!r} points outside of the archive; pack it again")
            if any(_hidden(part) for part in parts) or not parts:
                continue
            if member.is_dir():
                folders.add(parts)
            else:
                members[parts] = member
                folders.add(parts[:-1])
        # Packing a folder often puts that folder, and nothing else, at the top.
        depth = 1 if members and len({parts[0] for parts in members} | {f[0] for f in folders if f}) == 1 else 0
        if any(len(parts) == depth for parts in members):
            depth = 0
        self._members = {"/".join(parts[depth:]): member for parts, member in members.items()}
        self.sizes = {name: member.file_size for name, member in self._members.items()}
        self.folders = {parts[depth] for parts in folders if len(parts) > depth}

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise SFDError(f"{self.path} is a damaged zip archive ({error}); pack it again") from None

    def read(self, name: str) -> bytes:
        with self._lock:
            if self._owner != os.getpid():
                self._handle, self._owner = self._open(), os.getpid()
        return self._handle.read(self._members[name])

    def fingerprint(self) -> str:
        changed = self.path.stat().st_mtime_ns
        return stable_hash("archive", changed=changed, crcs={name: m.CRC for name, m in self._members.items()})

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_lock": None, "_handle": None, "_owner": 0}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _hidden(name: str) -> bool:
    """Whether a file or folder is one that systems leave behind."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _layout(path: Path, names: list[str], folders: set[str]) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Decide between class folders and images alone. Returns (names to check, class folders, skipped)."""
    top = [name for name in names if "/" not in name]
    images = [name for name in top if name.lower().endswith(SUFFIXES)]
    if not folders:
        return top, [], []
    if images:
        raise SFDError(
            f"{path} holds images beside its {len(folders)} sub-folders ({images[0]!r}, …); "
            "put every image into a class folder, or all of them side by side"
        )
    return [n for n in names if "/" in n], sorted(folders), [(n, "lies beside the class folders") for n in top]


def write_folder(source: ImageSource, path: Path | str) -> None:
    """Write a data set as PNGs that FolderSource reads back exactly: a sub-folder a class, none if unconditional.

    Raises:
        SFDError: `path` exists and is no empty folder, or cannot be written to.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SFDError(f"{path} exists already; give a new folder, or empty that one")
    folders = [path / name for name in source.classes] or [path]
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        with bar("Writing images", len(source)) as progress:
            for start in range(0, len(source), _CHUNK):
                images = source.load(range(start, min(start + _CHUNK, len(source))))
                for index, image in enumerate(images, start):
                    Image.fromarray(image).save(folders[source.labels[index]] / f"{index:06d}.png")
                progress.advance(len(images))
    except OSError as error:
        raise as_user_error(error, path) from error
