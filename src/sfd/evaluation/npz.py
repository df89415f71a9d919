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
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from sfd.data.images import Indices, stable_hash
from sfd.evaluation.metrics import Gaussian
from sfd.utils import files
from sfd.utils.errors import SFDError

IMAGES, LABELS, RECORD = "arr_0", "arr_1", "samples.json"
# What reading a damaged archive raises; RuntimeError is that of one with a password or an unknown compression.
DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int  # bytes before the first entry


class Npz:
    """An `.npz` whose arrays are read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise SFDError(f"there is no {path}; give an .npz such as `sfd pack` writes") from None
        except DAMAGE as error:
            raise self._damaged(error) from None
        members = self._archive.infolist()
        self.names = tuple(m.filename.removesuffix(".npy") for m in members)
        self.identity = stable_hash("npz", members=sorted((m.filename, m.file_size, m.CRC) for m in members))

    def header(self, name: str) -> _Header:
        """Read shape and type of an array, and verify that the file holds as many bytes as they take."""
        if name not in self.names or f"{name}.npy" not in self._archive.namelist():
            raise SFDError(f"{self.path} has no array {name!r} (it has {', '.join(self.names) or 'none'})")
        try:
            with self._archive.open(f"{name}.npy") as stream:
                version = npy.read_magic(stream)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                start = stream.tell()
        except DAMAGE as error:
            raise self._damaged(error) from None
        if dtype.hasobject or fortran:
            what = "Python objects, which are never unpickled" if dtype.hasobject else "its entries in Fortran's order"
            raise SFDError(f"{self.path}: array {name!r} holds {what}; save it as a plain array of numbers")
        expected, found = math.prod(shape) * dtype.itemsize, self._archive.getinfo(f"{name}.npy").file_size - start
        if expected != found:
            raise SFDError(
                f"{self.path}: array {name!r} of shape {shape} should take {expected:,} bytes, but has {found:,}; "
                "make or fetch the file again"
            )
        return _Header(shape, dtype, start)

    def array(self, name: str) -> np.ndarray:
        """Read a whole array."""
        header = self.header(name)
        with self.stream(name) as stream:
            data = self.read(stream, header.start, math.prod(header.shape) * header.dtype.itemsize)
        return np.frombuffer(data, header.dtype).reshape(header.shape)

    def record(self) -> dict[str, Any]:
        """Read how the images were made, if the archive says so; {} if not."""
        if RECORD not in self.names:
            return {}
        try:
            value = json.loads(self._archive.read(RECORD))
        except DAMAGE as error:
            raise self._damaged(error) from None
        return value if isinstance(value, dict) else {}

    def stream(self, name: str) -> IO[bytes]:
        """Open an array's bytes, header first."""
        return self._archive.open(f"{name}.npy")

    def read(self, stream: IO[bytes], start: int, size: int) -> bytes:
        """Read `size` bytes from `start` on. Forward costs nothing; backward, compressed files start over."""
        try:
            if stream.tell() != start:
                stream.seek(start)
            data = stream.read(size)
        except DAMAGE as error:
            raise self._damaged(error) from None
        if len(data) != size:
            raise self._damaged(EOFError("it ends too early"))
        return data

    def _damaged(self, error: Exception) -> SFDError:
        if isinstance(error, OSError) and error.errno is not None:
            return files.as_user_error(error, self.path)
        return SFDError(f"{self.path} is no whole .npz archive ({error}); make or fetch it again")


class NpzImages:
    """The images of an `.npz`, uint8 (N, S, S, 3) under `arr_0`."""

    def __init__(self, npz: Npz) -> None:
        self._npz, self._header = npz, npz.header(IMAGES)
        shape, dtype = self._header.shape, self._header.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not math.prod(shape) or shape[1] != shape[2]:
            raise SFDError(
                f"{npz.path}: {IMAGES} should hold square images, uint8 of shape (count, size, size, 3), "
                f"but is {dtype} of shape {shape}"
            )
        self.image_size = shape[1]
        self.identity = npz.identity
        self._stream = npz.stream(IMAGES)

    def __len__(self) -> int:
        return self._header.shape[0]

    def load(self, indices: Indices) -> np.ndarray:
        """Return a range of images as uint8 (B, S, S, 3); the indices follow one another."""
        size = math.prod(self._header.shape[1:])
        data = self._npz.read(self._stream, self._header.start + int(indices[0]) * size, len(indices) * size)
        return np.frombuffer(bytearray(data), np.uint8).reshape(len(indices), *self._header.shape[1:])  # writable


def read_labels(npz: Npz, count: int) -> np.ndarray | None:
    """Read the classes of an archive's images, (count,) int64; None if it has none."""
    if LABELS not in npz.names:
        return None
    shape, dtype, _ = npz.header(LABELS)
    if shape != (count,) or dtype.kind not in "iu":
        raise SFDError(f"{npz.path}: {LABELS} should be {count} whole numbers, but is {dtype} of shape {shape}")
    labels = npz.array(LABELS).astype(np.int64)
    if labels.min() < 0:
        raise SFDError(f"{npz.path}: {LABELS} has the class {labels.min()}; classes count from 0")
    return labels


def read_moments(npz: Npz, mean: str, covariance: str, size: int) -> Gaussian | None:
    """Read stored moments of `size` features; None if there are none."""
    if mean not in npz.names and covariance not in npz.names:
        return None
    for name, expected in ((mean, (size,)), (covariance, (size, size))):
        shape, dtype, _ = npz.header(name)
        if shape != expected or dtype.kind != "f":
            raise SFDError(
                f"{npz.path}: {name!r} should be floating-point numbers of shape {expected}, "
                f"but is {dtype} of shape {shape}; use statistics of this extractor"
            )
    mu, sigma = (npz.array(name).astype(np.float64) for name in (mean, covariance))
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise SFDError(f"{npz.path}: {mean!r} and {covariance!r} should be finite; make or fetch the file again")
    return Gaussian(mu, sigma, count=0)
