"""Distances between two sets of images, seen through the features of an extractor.

All statistics are float64. Definitions are those of the ADM evaluation (Dhariwal and Nichol 2021, arXiv 2105.05233), so
that numbers compare with published ones; the features decide what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sfd.utils.errors import SFDError

Array = NDArray[np.float64]
BLOCK = 4096  # features that are in memory in float64 at once


@dataclass(frozen=True)
class Gaussian:
    """The first two moments of a set of features."""

    mean: Array  # (D,)
    covariance: Array  # (D, D), unbiased
    count: int  # features behind them; 0 if not known


class GaussianAccumulator:
    """Mean and covariance gathered batch by batch; how the set is cut into batches does not matter.

    Batches are merged by their own centred moments (Chan, Golub and LeVeque 1979): sums of raw squares would cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Array = np.zeros(0)
        self._scatter: Array = np.zeros((0, 0))

    def update(self, features: ArrayLike) -> None:
        """Add a batch (B, D)."""
        batch = _features(features)
        if not len(batch):
            return
        if not self.count:
            self._mean, self._scatter = np.zeros(batch.shape[1]), np.zeros((batch.shape[1], batch.shape[1]))
        mean = batch.mean(axis=0)
        centred, shift = batch - mean, mean - self._mean
        total = self.count + len(batch)
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean = self._mean + shift * (len(batch) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Give the moments of everything seen so far.

        Raises:
            SFDError: fewer than two features were seen, so that there is no covariance.
        """
        if self.count < 2:
            raise SFDError(f"a covariance needs at least 2 images, got {self.count}; add images")
        return Gaussian(self._mean, self._scatter / (self.count - 1), self.count)


def gaussian(features: ArrayLike) -> Gaussian:
    """Compute mean and covariance of features (N, D)."""
    moments, features = GaussianAccumulator(), np.asarray(features)
    for start in range(0, len(features), BLOCK):
        moments.update(features[start : start + BLOCK])
    return moments.gaussian()


def frechet_distance(a: Gaussian | ArrayLike, b: Gaussian | ArrayLike) -> float:
    """Compute the squared Fréchet distance |μa − μb|² + tr(A + B − 2·(A^½ B A^½)^½) of features (N, D) or Gaussians.

    Heusel et al. 2017 (arXiv 1706.08500). The trace of the root is the sum of the roots of the eigenvalues of the
    symmetric A^½ B A^½: unlike a general matrix root of A·B this stays real and accurate for singular covariances,
    the usual case when there are fewer images than features.
    """
    a, b = (each if isinstance(each, Gaussian) else gaussian(each) for each in (a, b))
    if a.mean.shape != b.mean.shape:
        raise SFDError(
            f"features of {a.mean.size} and {b.mean.size} dimensions cannot be compared; use one extractor for both"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ b.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)


class PrecisionRecall(NamedTuple):
    """How much of the samples is real, and how much of the real the samples cover; both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference: ArrayLike, samples: ArrayLike, k: int = 3, chunk: int = 1024) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A set's manifold is the union of balls around its points, each reaching the point's k-th nearest neighbour in the
    set. Precision is the share of samples (M, D) inside the manifold of the reference (N, D), recall the share of the
    reference inside that of the samples.

    Args:
        reference: features of real images.
        samples: features of generated ones.
        k: neighbours, at least 1 and fewer than the points of either set.
        chunk: rows of the distance matrix in memory at once; changes no result.
    """
    real, made = _features(reference), _features(samples)
    for label, points in (("reference", real), ("sample", made)):
        if len(points) <= k:
            raise SFDError(f"precision and recall need more than k = {k} {label} images, got {len(points)}; add images")
    return PrecisionRecall(
        precision=_share_inside(made, real, _radii(real, k, chunk), chunk),
        recall=_share_inside(real, made, _radii(made, k, chunk), chunk),
    )


def inception_score(probabilities: ArrayLike, split_size: int = 5000) -> float:
    """Inception score (Salimans et al. 2016, arXiv 1606.03498) of class probabilities (N, K).

    The mean over consecutive splits (the last may be shorter, as in ADM) of exp of the mean KL divergence between an
    image's class distribution and that of the split.
    """
    p = _features(probabilities)
    scores = []
    for start in range(0, len(p), split_size):
        part = p[start : start + split_size]
        safe = np.maximum(part, np.finfo(np.float64).tiny)  # 0·log 0 = 0
        divergence = (part * (np.log(safe) - np.log(safe.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def _features(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise SFDError(f"features must have shape (images, dimensions), got {array.shape}; flatten them first")
    return array


def _squared_distances(rows: Array, points: Array) -> Array:
    """(R, D) and (N, D) to (R, N); rounding below zero is cut off."""
    squares = (rows**2).sum(axis=1)[:, None] + (points**2).sum(axis=1) - 2 * rows @ points.T
    return np.maximum(squares, 0)


def _radii(points: Array, k: int, chunk: int) -> Array:
    """Squared distance of each point to its k-th nearest other point: (N,)."""
    radii = []
    for start in range(0, len(points), chunk):
        distances = _squared_distances(points[start : start + chunk], points)
        radii.append(np.partition(distances, k, axis=1)[:, k])  # place 0 is the point itself
    return np.concatenate(radii)


def _share_inside(points: Array, centres: Array, radii: Array, chunk: int) -> float:
    """Share of points that lie within the radius of at least one centre."""
    inside = 0
    for start in range(0, len(points), chunk):
        distances = _squared_distances(points[start : start + chunk], centres)
        inside += int((distances <= radii).any(axis=1).sum())
    return inside / len(points)
