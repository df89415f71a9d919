"""Features of many images, in memory or cached on disk: a stopped evaluation resumes, and ranks share the work.

Chunk k of a cache holds images k·1000 to k·1000 + 999, in a folder named by the identities of the images and the
extractor. A chunk depends on nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sfd.data.images import Images
from sfd.evaluation.extractors._base import Extraction, Extractor
from sfd.utils import distributed, files
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar

CHUNK = 1000
BATCH = 256


def extract(
    images: Images | np.ndarray,
    extractor: Extractor,
    description: str = "features",
    *,
    cache: Path | None = None,
    batch_size: int = BATCH,
) -> Extraction | None:
    """Compute the features of images.

    Args:
        images: what to look at; an array is uint8 (N, S, S, 3), and cannot be cached.
        extractor: the network.
        description: for the progress bar.
        cache: folder that keeps features. Chunks in it are not computed again, and each rank (of RANK and WORLD_SIZE)
            computes its slice of the missing ones.
        batch_size: images that the extractor gets at once.

    Returns:
        the features of all images; None while other ranks have not written all of theirs.
    """
    count = len(images)
    if not count:
        raise SFDError("there are no images to evaluate; sample some first")
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]

    def compute(chunk: range) -> Extraction:
        seen = []
        for start in range(chunk.start, chunk.stop, batch_size):
            batch = range(start, min(start + batch_size, chunk.stop))
            pixels = images[batch.start : batch.stop] if isinstance(images, np.ndarray) else images.load(batch)
            seen.append(extractor.extract(pixels))
            shown.update(len(batch))
        return _concatenate(seen)

    if cache is None or isinstance(images, np.ndarray):
        with bar(description, count) as shown:
            return _concatenate([compute(chunk) for chunk in chunks])
    folder = cache / f"{images.identity}-{extractor.identity}"
    paths = [folder / f"features-{k:05d}.safetensors" for k in range(len(chunks))]
    mine = distributed.rank_slice(list(zip(paths, chunks, strict=True)))
    missing = [(path, chunk) for path, chunk in mine if _read(path, len(chunk)) is None]
    total = sum(len(chunk) for _, chunk in mine)
    with bar(description, total, total - sum(len(chunk) for _, chunk in missing)) as shown:
        for path, chunk in missing:
            arrays = {name: a for name, a in compute(chunk)._asdict().items() if a is not None}
            with files.atomic_write(path, shared=True) as partial:
                save_file(arrays, str(partial))
    seen = [_read(path, len(chunk)) for path, chunk in zip(paths, chunks, strict=True)]
    whole = [chunk for chunk in seen if chunk is not None]
    return _concatenate(whole) if len(whole) == len(chunks) else None


def _read(path: Path, count: int) -> Extraction | None:
    """Read a chunk; None if it is missing or damaged."""
    try:
        arrays = {name: tensor.numpy() for name, tensor in files.read_tensors(path).items()}
    except SFDError:
        return None
    if "features" not in arrays or any(len(array) != count for array in arrays.values()):
        return None
    return Extraction(arrays["features"], arrays.get("probabilities"), arrays.get("spatial"))


def _concatenate(batches: list[Extraction]) -> Extraction:
    def joined(arrays: list[np.ndarray | None]) -> Any:
        present = [array for array in arrays if array is not None]
        return np.concatenate(present) if present else None

    return Extraction(*(joined(list(column)) for column in zip(*batches, strict=True)))
