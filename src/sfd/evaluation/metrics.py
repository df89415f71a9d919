"""Distances between two sets of images, in the feature space of an extractor.

All statistics are float64. The definitions are those of ADM's evaluation (Dhariwal and Nichol 2021, arXiv 2105.05233),
so that numbers compare with published ones; the features decide what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sfd.utils.errors import SFDError

Array = NDArray[np.float64]
BLOCK = 4096  # features converted to float64 at once


@dataclass(frozen=True)
class Gaussian:
    """The first two moments of a set of features."""

    mean: Array  # (D,)
    covariance: Array  # (D, D), unbiased
    count: int  # number of features; 0 if not known


class PrecisionRecall(NamedTuple):
    """The share of samples that look real, and the share of real images that the samples cover; both in [0, 1]."""

    precision: float
    recall: float


def gaussian(features: ArrayLike) -> Gaussian:
    """Compute mean and covariance of features (N, D), N ≥ 2."""
    points = _matrix(features)
    if len(points) < 2:
        raise SFDError(f"a covariance needs at least 2 images, got {len(points)}; add images")
    mean: Array = points.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((mean.size, mean.size))
    for start in range(0, len(points), BLOCK):
        centred = points[start : start + BLOCK] - mean
        scatter += centred.T @ centred
    return Gaussian(mean, scatter / (len(points) - 1), len(points))


def frechet_distance(a: ArrayLike | Gaussian, b: ArrayLike | Gaussian) -> float:
    """Compute the squared Fréchet distance |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a^½ Σ_b Σ_a^½)^½).

    Heusel et al. 2017 (arXiv 1706.08500). The trace of the root is the sum of the roots of the eigenvalues of the
    symmetric Σ_a^½ Σ_b Σ_a^½: unlike a general root of Σ_a·Σ_b this stays real and accurate for singular covariances,
    the usual case with fewer images than dimensions.

    Args:
        a, b: features (N, D) and (M, D), or their moments.
    """
    first, second = (x if isinstance(x, Gaussian) else gaussian(x) for x in (a, b))
    if first.mean.shape != second.mean.shape:
        raise SFDError(
            f"features of {first.mean.size} and {second.mean.size} dimensions cannot be compared; use one extractor "
            "for both"
        )
    root = square_root(first.covariance)
    cross = np.sqrt(np.linalg.eigvalsh(root @ second.covariance @ root).clip(0)).sum()
    difference = first.mean - second.mean
    total = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross
    return max(float(total), 0.0)


def square_root(covariance: Array) -> Array:
    """Compute the symmetric root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def precision_recall(reference: ArrayLike, samples: ArrayLike, k: int = 3) -> PrecisionRecall:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    Precision is the share of samples (M, D) within the manifold of the reference (N, D), recall the share of the
    reference within that of the samples; see `within_manifold`.
    """
    return PrecisionRecall(
        precision=float(within_manifold(samples, reference, k).mean()),
        recall=float(within_manifold(reference, samples, k).mean()),
    )


def within_manifold(points: ArrayLike, others: ArrayLike, k: int = 3, chunk: int = 1024) -> NDArray[np.bool_]:
    """Find which points (M, D) are within the manifold of others (N, D), as bool (M,).

    The manifold is the union of balls around the others, each reaching to the k-th nearest other one. Copies count as
    neighbours: an image that occurs more than k times has radius 0, and its ball holds its copies alone.

    Args:
        points: features.
        others: features, more than k.
        k: neighbours, at least 1.
        chunk: rows of the distance matrix in memory at once; it changes no result.
    """
    rows, centres = _matrix(points).astype(np.float64), _matrix(others).astype(np.float64)
    if len(centres) <= k:
        raise SFDError(f"precision and recall need more than k = {k} images in both sets, got {len(centres)}")
    starts = range(0, len(centres), chunk)
    # Place 0 is the point itself.
    nearest = [np.partition(_squared_distances(centres[i : i + chunk], centres), k, axis=1)[:, k] for i in starts]
    radii = np.concatenate(nearest)
    inside = [
        (_squared_distances(rows[i : i + chunk], centres) <= radii).any(axis=1) for i in range(0, len(rows), chunk)
    ]
    return np.concatenate(inside)


def inception_score(probabilities: ArrayLike, split_size: int = 5000) -> float:
    """Compute the inception score (Salimans et al. 2016, arXiv 1606.03498) of class probabilities (N, K).

    The mean over consecutive splits (the last may be shorter, as in ADM) of exp of the mean KL divergence between an
    image's class distribution and that of the split.
    """
    return float(np.mean([np.exp(split.mean()) for split in class_divergences(probabilities, split_size)]))


def class_divergences(probabilities: ArrayLike, split_size: int = 5000) -> list[Array]:
    """Compute KL(p_i ‖ mean of the split) of every image i, by split."""
    p = _matrix(probabilities).astype(np.float64)
    divergences = []
    for start in range(0, len(p), split_size):
        split = p[start : start + split_size]
        safe = np.maximum(split, np.finfo(np.float64).tiny)  # 0·log 0 = 0
        divergences.append((split * (np.log(safe) - np.log(safe.mean(axis=0)))).sum(axis=1))
    return divergences


def _matrix(values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 2:
        raise SFDError(f"features must have shape (images, dimensions), got {array.shape}; flatten them first")
    return array


def _squared_distances(rows: Array, points: Array) -> Array:
    """(R, D) and (N, D) to (R, N); what rounding alone can explain is exactly 0, so that copies have distance 0."""
    squares = (rows**2).sum(axis=1)[:, None] + (points**2).sum(axis=1)
    distances: Array = squares - 2 * rows @ points.T
    distances[distances <= 4 * np.finfo(np.float64).eps * rows.shape[1] * squares] = 0
    return distances
