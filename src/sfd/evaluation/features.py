"""Features of many images, kept in chunks on disk: a run that was stopped goes on, and several may share the work.

Chunk k holds images k·1000 to k·1000 + 999, in a folder named after the images and the extractor. What is in a chunk
depends on nothing else, so neither does any number that is computed from them.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from sfd.evaluation.extractors._base import Extraction, Extractor
from sfd.evaluation.samples import Images
from sfd.utils import files
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar
from sfd.utils.shares import Share

CHUNK = 1000


class Features:
    """The features of images under an extractor, in chunks below `folder`."""

    def __init__(self, folder: Path, images: Images, extractor: Extractor) -> None:
        self.images, self.extractor = images, extractor
        self.folder = folder / f"{images.identity}-{extractor.identity}"
        self._chunks = range(math.ceil(len(images) / CHUNK))

    def compute(self, batch_size: int, share: Share, description: str) -> None:
        """Compute the chunks of a share that are not there yet.

        Raises:
            SFDError: another process computes the same share, or the images cannot be read.
        """
        chunks = share.take(self._chunks)
        missing = [chunk for chunk in chunks if self._load(chunk) is None]
        total = sum(len(self._indices(chunk)) for chunk in chunks)
        with (
            files.exclusive(self.folder / f"part-{share.number}-of-{share.of}"),
            bar(description, total, total - sum(len(self._indices(chunk)) for chunk in missing)) as shown,
        ):
            for chunk in missing:
                indices, seen = self._indices(chunk), []
                for start in range(0, len(indices), batch_size):
                    seen.append(self.extractor.extract(self.images.load(indices[start : start + batch_size])))
                    shown.advance(len(seen[-1].features))
                tensors = concatenated(seen)._asdict()
                present = {name: torch.from_numpy(array) for name, array in tensors.items() if array is not None}
                files.write_tensors(self._path(chunk), present)

    def read(self) -> Extraction:
        """Read the features of all images.

        Raises:
            SFDError: some are not computed yet.
        """
        seen = [self._load(chunk) for chunk in self._chunks]
        missing = sum(chunk is None for chunk in seen)
        if missing:
            raise SFDError(f"{self.folder} lacks {missing} of {len(seen)} chunks of features; compute all parts first")
        return concatenated([chunk for chunk in seen if chunk is not None])

    def _indices(self, chunk: int) -> range:
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.images)))

    def _path(self, chunk: int) -> Path:
        return self.folder / f"features-{chunk:05d}.safetensors"

    def _load(self, chunk: int) -> Extraction | None:
        """Read a chunk; None if it is missing or not whole."""
        try:
            arrays = {name: t.numpy() for name, t in files.read_tensors(self._path(chunk)).items()}
        except SFDError:
            return None
        count = len(self._indices(chunk))
        if "features" not in arrays or any(len(array) != count for array in arrays.values()):
            return None
        return Extraction(arrays["features"], arrays.get("probabilities"), arrays.get("spatial"))


def concatenated(parts: list[Extraction]) -> Extraction:
    """Join what was seen in successive batches.

    Raises:
        SFDError: there are none.
    """
    if not parts:
        raise SFDError("there are no images to evaluate; sample some first")

    def joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        present = [array for array in arrays if array is not None]
        return np.concatenate(present) if present else None

    return Extraction(
        np.concatenate([part.features for part in parts]),
        joined([part.probabilities for part in parts]),
        joined([part.spatial for part in parts]),
    )
