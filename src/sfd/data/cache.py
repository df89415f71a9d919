"""Keep a data set's decoded images in memory where they fit, and read images with all cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

import numpy as np

from sfd.data.images import ImageSource, Indices
from sfd.utils.progress import bar
from sfd.utils.threads import ahead

# Bytes of decoded images that are kept in memory.
BUDGET = 2 * 2**30

_CHUNK = 256

Result = TypeVar("Result")


class CachedSource:
    """A source whose images are decoded once, when the first one is loaded, into one uint8 array (length, S, S, 3)."""

    def __init__(self, source: ImageSource) -> None:
        self.classes, self.labels = source.classes, source.labels
        self.image_size, self.identity = source.image_size, source.identity
        self.resident = True
        self._source: ImageSource | None = source
        self._length = len(source)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def load(self, indices: Indices) -> np.ndarray:
        """Return copies of the images at `indices` as uint8 (B, S, S, 3)."""
        with self._lock:
            if self._source is not None:
                self._pixels = self._decode(self._source)
                self._source = None
        return self._pixels[np.asarray(indices, dtype=np.int64)]

    def _decode(self, source: ImageSource) -> np.ndarray:
        pixels = np.empty((len(source), source.image_size, source.image_size, 3), np.uint8)

        def fill(rows: range) -> None:
            pixels[rows.start : rows.stop] = source.load(rows)

        map_ranges("Loading images", len(source), fill)
        return pixels


def nbytes(count: int, image_size: int) -> int:
    """Size of `count` decoded images."""
    return count * image_size**2 * 3


def cached(source: ImageSource, budget: int = BUDGET) -> ImageSource:
    """Keep a source's images in memory if that takes at most `budget` bytes; else, or if they are, return it as is."""
    if source.resident or nbytes(len(source), source.image_size) > budget:
        return source
    return CachedSource(source)


def map_ranges(title: str, count: int, function: Callable[[range], Result]) -> list[Result]:
    """Call a function with successive ranges that cover [0, count), several at a time, with a progress bar."""
    ranges = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    results = []
    with bar(title, count) as progress, closing(ahead(function, ranges, min(16, os.cpu_count() or 1))) as found:
        for part, result in zip(ranges, found, strict=True):
            results.append(result)
            progress.update(len(part))
    return results
