"""Bootstrap intervals of metrics over the draw of images (Efron 1979).

To first order a metric is its value plus the mean of one contribution per image (its influence function), which is
resampled instead of the images. That costs one evaluation of the metric, and keeps copies that resampling makes from
shrinking neighbourhoods and covariances. The bias of a metric with few images is not part of its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfd.evaluation.metrics import BLOCK, Array, Gaussian, class_divergences, frechet_distance, gaussian, square_root
from sfd.utils import rng

LEVEL = 0.95
RESAMPLES = 1000


class Estimate(NamedTuple):
    """A metric with its interval."""

    value: float
    low: float
    high: float


def mean_estimate(value: float, contributions: Array) -> Estimate:
    """Resample contributions (N,) with replacement; the same numbers give the same interval."""
    count, generator = len(contributions), rng.generator(0, "bootstrap")
    means = [contributions[generator.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(np.array(means) - contributions.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, value + float(low), value + float(high))


def share(hits: NDArray[np.bool_]) -> Estimate:
    """Estimate a share. Two hits and two misses are added (Agresti and Coull 1998): 4 of 4 does not mean always."""
    padded = np.concatenate([hits.astype(np.float64), [0, 0, 1, 1]])
    resampled = mean_estimate(float(padded.mean()), padded)
    value = float(hits.mean())
    return Estimate(value, min(value, resampled.low), max(value, resampled.high))


def frechet(reference: Gaussian, features: NDArray[np.floating], strata: NDArray[np.int64] | None = None) -> Estimate:
    """Estimate the Fréchet distance of features (N, D) from a reference, which stays as it is.

    The gradient by the samples' mean is 2·(μ − μ_r), that by their covariance I − R·(RΣR)^−½·R with R = Σ_r^½.

    Args:
        strata: class of each image (N,), if as many of each were drawn on purpose: another draw has the same
            classes, so that only differences within a class count. Ignored where a class has a single image.
    """
    own = gaussian(features)
    root = square_root(reference.covariance)
    values, vectors = np.linalg.eigh(root @ own.covariance @ root)
    kept = values > len(values) * np.finfo(np.float64).eps * values.max(initial=0)
    half = root @ vectors[:, kept] / values[kept] ** 0.25  # its product with its transpose is the map to the reference
    contributions = []
    for start in range(0, len(features), BLOCK):
        centred = features[start : start + BLOCK] - own.mean
        quadratic = (centred**2).sum(axis=1) - ((centred @ half) ** 2).sum(axis=1)
        contributions.append(2 * centred @ (own.mean - reference.mean) + quadratic)
    each = np.concatenate(contributions)
    if strata is not None and (counts := np.bincount(strata)[strata]).min() > 1:
        each -= np.bincount(strata, each)[strata] / counts
        each *= np.sqrt(counts / (counts - 1))  # a few images spread less about their own mean than about the true one
    found = mean_estimate(frechet_distance(reference, own), each)
    return found._replace(low=max(found.low, 0.0))


def inception(probabilities: NDArray[np.floating]) -> Estimate:
    """Estimate the inception score of class probabilities (N, K)."""
    splits: Sequence[Array] = class_divergences(probabilities)
    scores, contributions = [], []
    for split in splits:
        scores.append(float(np.exp(split.mean())))
        share_of_split = len(split) * len(splits) / len(probabilities)
        contributions.append(scores[-1] * (split - split.mean()) / share_of_split)
    return mean_estimate(float(np.mean(scores)), np.concatenate(contributions))
