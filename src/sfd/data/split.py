"""Divide a data set into images for training and images that are held out for evaluation."""

from __future__ import annotations

import numpy as np

from sfd.data.images import ImageSource, Indices, stable_hash
from sfd.utils import rng
from sfd.utils.errors import SFDError


class Subset:
    """A view of some of a source's images, in a given order.

    Args:
        source: where the images are.
        indices: (length,) of the source's images.
    """

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.classes = source.classes
        self.labels = source.labels[self.indices]
        self.image_size = source.image_size
        self.identity = stable_hash("subset", source=source.identity, indices=self.indices.tolist())

    @property
    def resident(self) -> bool:
        """Whether the decoded images are in memory."""
        return self.source.resident

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, indices: Indices) -> np.ndarray:
        """Return the images at `indices` of this subset as uint8 (B, S, S, 3)."""
        return self.source.load(self.indices[np.asarray(indices, dtype=np.int64)])


def split(source: ImageSource, holdout: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Divide a source into (training, held-out) images, each class in the same proportion; a function of its arguments.

    Args:
        source: at least two images of each class, so that either side has one of each.
        holdout: share held out, in [0, 1); at 0 nothing is, and training gets the source itself.
        seed: which images are held out.
    """
    if not 0 <= holdout < 1:
        raise SFDError(f"holdout is {holdout}, but it is a share from 0 up to, not including, 1; give one such as 0.5")
    if holdout == 0:
        return source, Subset(source, np.empty(0, np.int64))
    counts = np.bincount(source.labels, minlength=max(1, len(source.classes)))
    few = [repr(source.classes[label]) for label in np.flatnonzero(counts < 2)] if source.classes else []
    if counts.min() < 2:
        mend = f"classes with fewer: {', '.join(few)}; add images or remove these classes" if few else "add images"
        raise SFDError(f"each class needs at least 2 images, one for training and one that is held out; {mend}")
    training, held_out = [], []
    for label in range(len(counts)):
        members = np.flatnonzero(source.labels == label)
        order = rng.generator(seed, "split", label).permutation(members)
        count = min(max(round(holdout * len(members)), 1), len(members) - 1)
        held_out.append(order[:count])
        training.append(order[count:])
    return Subset(source, np.sort(np.concatenate(training))), Subset(source, np.sort(np.concatenate(held_out)))
