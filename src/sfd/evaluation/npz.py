"""Archives of arrays (`.npz`), as ADM's evaluation keeps samples and reference statistics in (arXiv 2105.05233).

`arr_0` holds images, `arr_1` their classes; `mu`, `sigma` are the moments of Inception's pooled features over a whole
data set, `mu_s`, `sigma_s` those of its spatial ones. 50 000 images of 256×256 pixels take 9.8 GB, so they are
streamed. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from sfd.data.images import Indices, stable_hash
from sfd.evaluation.metrics import Gaussian
from sfd.utils import files
from sfd.utils.errors import SFDError

IMAGES, LABELS, RECORD = "arr_0", "arr_1", "samples.json"
# What reading a damaged archive raises; RuntimeError is that of one with a password or an unknown compression.
DAMAGE = (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error, RuntimeError)


class Npz:
    """An `.npz` whose arrays are read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise SFDError(f"there is no {path}; give an .npz such as `sfd pack` writes")
        with self.reading():
            self.archive = zipfile.ZipFile(path)
        members = self.archive.infolist()
        self.names = tuple(m.filename.removesuffix(".npy") for m in members)
        self.identity = stable_hash("npz", members=sorted((m.filename, m.file_size, m.CRC) for m in members))

    def array(self, name: str) -> np.ndarray:
        """Read a whole array."""
        if f"{name}.npy" not in self.archive.namelist():
            raise SFDError(f"{self.path} has no array {name!r} (it has {', '.join(self.names) or 'none'})")
        with self.reading(), self.archive.open(f"{name}.npy") as stream:
            return npy.read_array(stream, allow_pickle=False)

    def record(self) -> dict[str, Any]:
        """Read how the images were made, if the archive says so; {} if not."""
        if RECORD not in self.names:
            return {}
        with self.reading():
            value = json.loads(self.archive.read(RECORD))
        return value if isinstance(value, dict) else {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say what a damaged archive is."""
        try:
            yield
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise files.as_user_error(error, self.path) from None
            raise SFDError(f"{self.path} is no whole .npz archive ({error}); make or fetch it again") from None


class NpzImages:
    """The images of an `.npz`, uint8 (N, S, S, 3) under `arr_0`."""

    def __init__(self, npz: Npz) -> None:
        if f"{IMAGES}.npy" not in npz.archive.namelist():
            raise SFDError(f"{npz.path} has no array {IMAGES!r} (it has {', '.join(npz.names) or 'none'})")
        self.identity, self._npz = npz.identity, npz
        with npz.reading():
            self._stream = npz.archive.open(f"{IMAGES}.npy")
            version = npy.read_magic(self._stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            self._shape, fortran, dtype = read(self._stream)
        self._start = self._stream.tell()
        shape = self._shape
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or not shape[0] or shape[1] != shape[2]:
            order = ", in Fortran's order" if fortran else ""
            raise SFDError(
                f"{npz.path}: {IMAGES} should hold square images, uint8 of shape (count, size, size, 3), "
                f"but is {dtype} of shape {shape}{order}"
            )
        self.image_size = shape[1]

    def __len__(self) -> int:
        return int(self._shape[0])

    def load(self, indices: Indices) -> np.ndarray:
        """Return a range of images as uint8 (B, S, S, 3); the indices follow one another.

        Forward costs nothing; backward, compressed files start over.
        """
        size = math.prod(self._shape[1:])
        with self._npz.reading():
            self._stream.seek(self._start + int(indices[0]) * size)
            data = self._stream.read(len(indices) * size)
            if len(data) != len(indices) * size:
                raise EOFError("it ends too early")
        return np.frombuffer(bytearray(data), np.uint8).reshape(len(indices), *self._shape[1:])  # writable


def read_labels(npz: Npz, count: int) -> np.ndarray | None:
    """Read the classes of an archive's images, (count,) int64; None if it has none."""
    if LABELS not in npz.names:
        return None
    labels = npz.array(LABELS)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise SFDError(
            f"{npz.path}: {LABELS} should be {count} whole numbers, but is {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0:
        raise SFDError(f"{npz.path}: {LABELS} has the class {labels.min()}; classes count from 0")
    return labels.astype(np.int64)


def read_moments(npz: Npz, mean: str, covariance: str, size: int) -> Gaussian | None:
    """Read stored moments of `size` features; None if there are none."""
    if mean not in npz.names and covariance not in npz.names:
        return None
    moments = []
    for name, shape in ((mean, (size,)), (covariance, (size, size))):
        array = npz.array(name)
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise SFDError(
                f"{npz.path}: {name!r} should be finite floating-point numbers of shape {shape}, "
                f"but is {array.dtype} of shape {array.shape}; use statistics of this extractor"
            )
        moments.append(array.astype(np.float64))
    return Gaussian(moments[0], moments[1], count=0)
