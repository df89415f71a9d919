"""Keep a data set's decoded images in memory where they fit."""

from __future__ import annotations

import numpy as np

from sfd.data.images import ImageSource, Indices
from sfd.utils.progress import bar

# Bytes of decoded images that are kept in memory.
BUDGET = 2 * 2**30

_CHUNK = 512


class CachedSource:
    """A source whose images are decoded once, on construction, into one uint8 array (length, S, S, 3)."""

    def __init__(self, source: ImageSource) -> None:
        size = source.image_size
        self.classes = source.classes
        self.labels = source.labels
        self.image_size = size
        self.identity = source.identity
        self.resident = True
        self._pixels = np.empty((len(source), size, size, 3), np.uint8)
        with bar("Loading images", len(source)) as progress:
            for start in range(0, len(source), _CHUNK):
                stop = min(start + _CHUNK, len(source))
                self._pixels[start:stop] = source.load(range(start, stop))
                progress.advance(stop - start)

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, indices: Indices) -> np.ndarray:
        """Return copies of the images at `indices` as uint8 (B, S, S, 3)."""
        return self._pixels[np.asarray(indices, dtype=np.int64)]


def nbytes(count: int, image_size: int) -> int:
    """Size of `count` decoded images."""
    return count * image_size**2 * 3


def cached(source: ImageSource, budget: int = BUDGET) -> ImageSource:
    """Decode a source into memory if that takes at most `budget` bytes; else, or if it is there, return it as is."""
    if source.resident or nbytes(len(source), source.image_size) > budget:
        return source
    return CachedSource(source)
