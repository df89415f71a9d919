"""Which files of a folder or a zip archive are images, and of what class: the one place that decides it.

    cat/a.png, dog/b.png          a sub-folder is a class, with all below it
    a.png, b.png                  no classes
    images/…                      a single folder with images is opened, as often as there is one
    00000/img0.png, dataset.json  EDM's layout: {"labels": [["00000/img0.png", 3], …]}, or null for no classes

Files left by operating systems are ignored. Captions, metadata and other files that are not images are side files.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from sfd.data.images import RAW, stable_hash, suffixes
from sfd.utils.errors import SFDError
from sfd.utils.files import failed_download
from sfd.utils.paths import user_path

# Files and folders of systems, in lower case; so is everything whose name begins with a dot.
_SYSTEM = frozenset((
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "@tmp", "@recycle", "#recycle",
    "#snapshot", "lost+found", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000",
    "network trash folder", "temporary items", "__pycache__",
))  # fmt: skip
# Suffixes of files that are not opened to see whether they are images.
_SIDE = frozenset((
    ".txt", ".json", ".jsonl", ".caption", ".captions", ".tags", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml",
    ".md", ".rst", ".html", ".htm", ".log", ".ini", ".py", ".sh", ".ipynb", ".pdf", ".xmp", ".aae", ".npy", ".npz",
    ".pt", ".pth", ".pkl", ".safetensors", ".ckpt", ".parquet", ".arrow", ".h5", ".hdf5", ".mat", ".db", ".lock",
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".mp3",
))  # fmt: skip
_SPLIT = re.compile(
    r"(.*[-_ .])?(train|training|val|valid|validation|dev|test|testing|eval|holdout|unlabell?ed|fold)"
    r"([-_ .]?(set|data|images|split|\d+|[ab]))?"
)
_LABELS = "dataset.json"
UNREADABLE = "cannot be read"
_LINKS = {errno.ENOENT: "a link to nothing", errno.ELOOP: "a link in a circle"}
# Larger files are not read: several at once could fill the memory.
_MAX_BYTES = 2**28


class ImageFiles:
    """The image files below a path, sorted by name; they are not opened.

    Attributes:
        path: as given, with `~` for the home folder.
        root: the folder below it that holds the classes, "" or "folder/".
        names: of the files that may be images, relative to the root, with forward slashes.
        classes: class names, sorted, in Unicode's composed form (NFC); () where there are none.
        labels: index into `classes` per name; all 0 where there are none.
        side: files that are not images, relative to the path.
        empty: folders that should be classes, but hold no image.
        skipped: (name, reason) of what cannot be read: dead or circular links, folders without permission.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = user_path(path)
        self._tree = _open_tree(self.path)
        self.skipped = [(name, reason) for name, reason in self._tree.skipped if _suffix(name) not in _SIDE]
        self.root = ""
        self.empty: list[str] = []
        candidates = sorted((name for name in self._tree.sizes if _suffix(name) not in _SIDE), key=nfc)
        images = [name for name in candidates if meant_as_image(name)] or candidates
        listed, folders = self._open_single_folders(images)
        below = self._below_root(candidates)
        class_of = _classes_of_folders(below, folders) if listed is None else self._classes_listed(below, listed)
        self.names = list(class_of)
        self.classes, self.labels = _numbered(list(class_of.values()))
        used = {self.root + name for name in [*self.names, *([] if listed is None else [_LABELS])]}
        used.update(name for name, _ in self.skipped)
        self.side = sorted(set(self._tree.sizes) - used)
        _check_names(self.path, self.classes)

    def _open_single_folders(self, images: Sequence[str]) -> tuple[dict[str, Any] | None, set[str]]:
        """Move the root down while one folder holds all images; give the labels listed there, if any, or the folders.

        Folders without images are added to `empty` on the way.
        """
        listed = self._listed_labels()
        if listed is not None:
            return listed, set()
        names = self._below_root(images)
        folders = {name.partition("/")[0] for name in names if "/" in name}
        self.empty += sorted({name.partition("/")[0] for name in self._below_root(self._tree.folders)} - folders)
        if len(folders) == 1 and all("/" in name for name in names):
            self.root += folders.pop() + "/"
            return self._open_single_folders(images)
        self._check_layout(names, folders)
        return None, folders

    def _below_root(self, names: Iterable[str]) -> list[str]:
        return [name[len(self.root) :] for name in names if name.startswith(self.root)]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._tree.sizes[self.root + name]

    def read(self, name: str) -> bytes:
        """Read a file; the message of an SFDError is the reason alone."""
        if _suffix(name) in RAW:
            raise SFDError("a camera's raw file; develop it to JPEG or PNG, for example with darktable-cli")
        if self.size(name) > _MAX_BYTES:
            raise SFDError(f"the file is larger than {_MAX_BYTES:,} bytes")
        try:
            return self._tree.read(self.root + name)
        except Exception as error:  # Decompressors meet damaged archives with errors of nearly every type.
            raise SFDError(f"{UNREADABLE} ({error})") from None

    def fingerprint(self) -> str:
        """Hash what changes when an image is added, removed or changed; not the path."""
        tree, names = self._tree, [self.root + name for name in self.names]
        return stable_hash(type(tree).__name__, files=[(name, tree.sizes[name], tree.stamps[name]) for name in names])

    def _check_layout(self, names: Sequence[str], folders: Collection[str]) -> None:
        """Refuse images next to class folders, and splits instead of classes."""
        where = self.path / self.root
        loose = [name for name in names if "/" not in name]
        if loose and folders:
            raise SFDError(
                f"{where} holds images next to sub-folders ({shown(loose[0])!r}, …); "
                "put every image into a class folder, or all of them side by side"
            )
        splits = _splits(folders)
        if splits:
            mend = f"give data.source={where / splits[0]}"
            if isinstance(self._tree, _Archive):
                mend = f"unpack it and give its folder {self.root}{splits[0]}"
            raise SFDError(f"{where} holds the splits {', '.join(splits)}, which are no classes; {mend}")

    def _listed_labels(self) -> dict[str, Any] | None:
        """Read EDM's `dataset.json` at the root: label by name, {} for no classes; None where there is none."""
        name = self.root + _LABELS
        if name not in self._tree.sizes:
            return None
        try:
            content = json.loads(self._tree.read(name))
        except (OSError, ValueError) as error:
            raise SFDError(f"{self.path / name} is damaged ({error}); make it again or remove it") from None
        if not isinstance(content, dict) or "labels" not in content:
            return None  # some other file of this name
        pairs = content["labels"] or []
        if not isinstance(pairs, list) or not all(map(_is_labelled, pairs)):
            raise SFDError(f'{self.path / name}: "labels" must be null or pairs of file name and class number')
        return {normpath(file.replace("\\", "/")): label for file, label in pairs}

    def _classes_listed(self, names: Sequence[str], labels: dict[str, Any]) -> dict[str, Any]:
        if not labels:
            return dict.fromkeys(names, 0)
        labels = {nfc(name): label for name, label in labels.items()}
        found = {name: labels.pop(nfc(name)) for name in names if nfc(name) in labels}
        self.skipped += [
            (self.root + n, f"has no label in {_LABELS}") for n in names if n not in found and meant_as_image(n)
        ]
        self.skipped += [(self.root + n, f"is named in {_LABELS}, but missing") for n in labels]
        return found


def meant_as_image(name: str) -> bool:
    """Whether a file's suffix is that of an image format."""
    return _suffix(name) in suffixes()


def nfc(name: str) -> str:
    """Unicode's composed form of a name: equal for names that look equal."""
    return unicodedata.normalize("NFC", name)


def shown(name: str) -> str:
    """A name as one line of valid text: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in name
    )


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _splits(folders: Collection[str]) -> list[str]:
    """Folders that are parts of one data set by their names (train and val, img_train and img_val), training first."""
    parts = defaultdict(list)
    for name in sorted(folders):
        if match := _SPLIT.fullmatch(name.lower()):
            parts[match[1]].append(name)
    found = max(parts.values(), key=len, default=[])
    return sorted(found, key=lambda name: "train" not in name.lower()) if len(found) > 1 else []


def _is_labelled(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) in (int, str)


def _classes_of_folders(names: Sequence[str], folders: Collection[str]) -> dict[str, Any]:
    """Class by name: the folder at the top; 0 if all images are at the top. Other files are left out."""
    if not folders:
        return {name: 0 for name in names if "/" not in name}
    return {name: nfc(name.partition("/")[0]) for name in names if "/" in name and name.partition("/")[0] in folders}


def _numbered(values: Sequence[str | int]) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes, sorted, numbers before text, and each image's index; no names for a single class."""
    order = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    number = {value: label for label, value in enumerate(order)}
    return tuple(map(str, order)) if len(order) > 1 else (), [number[value] for value in values]


def _check_names(path: Path, classes: Sequence[str]) -> None:
    bad = [f"'{shown(name)}'" for name in classes if shown(name) != name]
    if bad:
        raise SFDError(
            f"{path}: names of class folders must be UTF-8 without control characters; rename {', '.join(bad[:5])}"
        )


def _open_tree(path: Path) -> _Folder | _Archive:
    if path.is_dir():
        return _Folder(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return _Archive(path)
    if path.is_file():
        raise SFDError(f"{path} is {_why_no_archive(path)}")
    if path.exists():
        raise SFDError(f"{path} is neither a folder nor a zip archive; give one that holds images")
    raise SFDError(
        f"there is no file or folder {path}; give a folder or a zip archive of images (in a recipe: data.source)"
    )


def _why_no_archive(path: Path) -> str:
    with path.open("rb") as handle:
        start = handle.read(512)
    if start.startswith(b"PK"):
        return "a damaged zip archive; fetch or pack it again"
    if _suffix(path.name) in suffixes():
        return f"a single image; give the folder that holds it, {path.parent}"
    if _suffix(path.name) in _SIDE:
        return failed_download(start) or "no zip archive; unpack or convert it, and give a folder of images"
    return failed_download(start) or "neither a folder nor a zip archive; give one that holds images"


class _Folder:
    """Files below a folder by name, relative, with forward slashes; links are followed, but not in circles."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        self.stamps: dict[str, int] = {}  # of modification, in nanoseconds
        self.folders: set[str] = set()
        self.skipped: list[tuple[str, str]] = []
        try:
            self._scan(str(path), "", (os.path.realpath(path),))
        except OSError as error:
            raise SFDError(f"{path} cannot be listed ({error.strerror}); give a readable one") from None

    def _scan(self, folder: str, prefix: str, above: tuple[str, ...]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_system(entry.name):
                    continue
                try:
                    self._add(entry, prefix + entry.name, above)
                except OSError as error:
                    link = _LINKS.get(error.errno or 0) if entry.is_symlink() else None
                    self.skipped.append((prefix + entry.name, link or f"{UNREADABLE} ({error.strerror})"))

    def _add(self, entry: os.DirEntry[str], name: str, above: tuple[str, ...]) -> None:
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real in above:
                raise OSError(errno.ELOOP, "a link in a circle")
            self.folders.add(name)
            self._scan(entry.path, f"{name}/", (*above, real))
            return
        status = entry.stat()
        if stat.S_ISREG(status.st_mode):
            self.sizes[name], self.stamps[name] = status.st_size, status.st_mtime_ns
        else:
            self.skipped.append((name, "no regular file"))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class _Archive:
    """Members of a zip archive. One handle serves all threads: the zipfile module locks every read."""

    def __init__(self, path: Path) -> None:
        try:
            self._handle = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise SFDError(f"{path} is a damaged zip archive ({error}); pack it again") from None
        self._members: dict[str, zipfile.ZipInfo] = {}
        self.folders: set[str] = set()
        self.skipped: list[tuple[str, str]] = []
        for member in self._handle.infolist():
            # Some Windows programs write backslashes.
            parts = [part for part in member.filename.replace("\\", "/").split("/") if part]
            if any(map(_is_system, parts)) or not parts:
                continue
            if not member.is_dir():
                self._members["/".join(parts)] = member
                parts.pop()
            self.folders |= {"/".join(parts[: depth + 1]) for depth in range(len(parts))}
        self.sizes = {name: member.file_size for name, member in self._members.items()}
        self.stamps = {name: member.CRC for name, member in self._members.items()}

    def read(self, name: str) -> bytes:
        return self._handle.read(self._members[name])
