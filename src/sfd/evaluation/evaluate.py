"""Compares samples with a reference. Every number comes with its protocol, its interval and what makes it doubtful."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfd.data.images import Images, ImageSource
from sfd.data.split import Subset
from sfd.evaluation import intervals
from sfd.evaluation.extractors._base import Extraction
from sfd.evaluation.features import extract
from sfd.evaluation.intervals import Estimate
from sfd.evaluation.metrics import within_manifold
from sfd.evaluation.reference import NEIGHBOURS, Protocol, Reference
from sfd.utils import files, rng
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError

# With fewer images a metric says more of the images than of the model.
MIN_IMAGES = 1000
MIN_PER_DIMENSION = 2
MIN_ACCURACY = 0.7  # of an evaluation classifier
METRICS = ("frechet_distance", "sfid", "precision", "recall", "inception_score", "class_accuracy")


class Metrics(Settings):
    """One row of the results. A metric is None if reference, extractor or samples do not allow it."""

    name: str  # what was measured ("guided samples", "real training images")
    real: bool  # real images, not samples
    n_samples: int
    balanced: bool  # every class has equally many samples (or one more)
    frechet_distance: float | None
    sfid: float | None  # Fréchet distance of spatial features
    precision: float | None
    recall: float | None
    inception_score: float | None  # under the extractor's classes
    class_accuracy: float | None  # share of samples whose class the extractor predicts
    intervals: dict[str, tuple[float, float]]  # 95 % bootstrap interval, by metric
    caveats: dict[str, tuple[str, ...]]  # why a metric cannot be trusted, by metric; only those that cannot
    not_comparable: tuple[str, ...] = ()  # why the numbers cannot be compared with published ones
    protocol: Protocol
    sampling: dict[str, Any]  # how the samples were made: solver, steps, guidance …

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        files.write_json(path, self.model_dump(mode="json"))


def read_metrics(path: Path) -> Metrics:
    """Read what `Metrics.write` wrote."""
    values = files.read_json(path, "folder of metrics")
    values.pop("accuracy_by_class", None)  # an earlier version wrote it
    return parse(Metrics, values, str(path))


def evaluate(
    samples: Images | np.ndarray | Extraction,
    labels: Sequence[int] | np.ndarray | None,
    reference: Reference,
    *,
    name: str,
    sampling: Mapping[str, Any] | None = None,
    real: bool = False,
) -> Metrics:
    """Compare images with a reference, through its extractor.

    Args:
        samples: images, uint8 (N, S, S, 3), or what the extractor saw in them.
        labels: class of each image, as index into the extractor's classes; None: images have none.
        reference: what to compare with.
        name: what the samples are, for tables.
        sampling: how they were made, plain values.
        real: these are real images.
    """
    seen = samples
    if not isinstance(seen, Extraction):
        found = extract(seen, reference.extractor, f"features of {name}")
        assert found is not None  # only a cache leaves work to other ranks
        seen = found
    classes = tuple(reference.extractor.classes)
    truth = None if labels is None or not classes else _checked(labels, len(seen.features), classes)
    estimates = dict(_measured(seen, truth, reference))
    values: dict[str, Any] = {metric: estimates[metric].value if metric in estimates else None for metric in METRICS}
    return Metrics(
        name=name,
        real=real,
        n_samples=len(seen.features),
        balanced=balanced(truth, len(classes)),
        **values,
        intervals={metric: (estimate.low, estimate.high) for metric, estimate in estimates.items()},
        caveats={metric: why for metric in estimates if (why := _caveats(metric, seen, reference))},
        protocol=reference.protocol,
        sampling=dict(sampling or {}),
    )


def _measured(seen: Extraction, truth: np.ndarray | None, reference: Reference) -> Iterator[tuple[str, Estimate]]:
    """Give each metric that samples, labels, extractor and reference allow."""
    count = len(seen.features)
    strata = truth if balanced(truth, len(reference.extractor.classes)) else None
    if count > 1 and reference.statistics is not None:
        yield "frechet_distance", intervals.frechet(reference.statistics, seen.features, strata)
    if count > 1 and reference.spatial is not None and seen.spatial is not None:
        yield "sfid", intervals.frechet(reference.spatial, seen.spatial, strata)
    if reference.features is not None and min(count, len(reference.features)) > NEIGHBOURS:
        yield "precision", intervals.share(within_manifold(seen.features, reference.features, NEIGHBOURS))
        yield "recall", intervals.share(within_manifold(reference.features, seen.features, NEIGHBOURS))
    if seen.probabilities is not None:
        yield "inception_score", intervals.inception(seen.probabilities)
        if truth is not None:
            yield "class_accuracy", intervals.share(seen.probabilities.argmax(axis=1) == truth)


def _caveats(metric: str, seen: Extraction, reference: Reference) -> tuple[str, ...]:
    """Say why a metric cannot be trusted; nothing if it can."""
    protocol, reasons = reference.protocol, []
    counts = {"sample": len(seen.features)}
    dimensions = 0
    if metric not in ("inception_score", "class_accuracy"):
        features = seen.spatial if metric == "sfid" else seen.features
        dimensions = 0 if features is None else features.shape[1]
        if not (protocol.stored_moments and metric in ("frechet_distance", "sfid")):
            counts["reference image"] = protocol.reference_count
    for what, count in counts.items():
        given = f"{count:,} {what}{'' if count == 1 else 's'}"
        if count < MIN_IMAGES:
            reasons.append(f"{given}, fewer than {MIN_IMAGES:,}")
        elif count < MIN_PER_DIMENSION * dimensions:
            reasons.append(f"{given}, fewer than {MIN_PER_DIMENSION} for each of {dimensions:,} feature dimensions")
    if protocol.extractor_images is not None and protocol.extractor_images < MIN_IMAGES:
        reasons.append(f"a classifier trained on {protocol.extractor_images:,} images, fewer than {MIN_IMAGES:,}")
    accuracy = protocol.extractor_accuracy
    if accuracy is not None and accuracy < MIN_ACCURACY:
        reasons.append(f"a classifier with an accuracy of {accuracy:.1%} on unseen images, below {MIN_ACCURACY:.0%}")
    return tuple(reasons)


def evaluate_real(source: ImageSource, reference: Reference, count: int, seed: int = 0) -> Metrics:
    """Measure real training images as if they were samples: the floor that a perfect model would reach.

    Args:
        source: real images, none of them in the reference.
        reference: what to compare with.
        count: how many, as even over the classes as they go; as many as there are samples makes it comparable.
        seed: of the choice.
    """
    chosen = Subset(source, _balanced_choice(np.asarray(source.labels), min(count, len(source)), seed))
    labels = chosen.labels if chosen.classes else None
    return evaluate(chosen, labels, reference, name="real training images", real=True)


def balanced(labels: Sequence[int] | np.ndarray | None, classes: int) -> bool:
    """Whether each of `classes` classes has equally many images, or one more; without labels, whether there is one."""
    if labels is None:
        return classes <= 1
    counts = np.bincount(np.asarray(labels, np.int64), minlength=classes)
    return int(counts.max() - counts.min()) <= 1


def _checked(labels: Sequence[int] | np.ndarray, count: int, classes: Sequence[str]) -> np.ndarray:
    truth = np.asarray(labels, np.int64)
    if truth.shape != (count,):
        raise SFDError(f"got labels of shape {truth.shape} for {count} images; give one label per image")
    if truth.min() < 0 or truth.max() >= len(classes):
        raise SFDError(
            f"labels run from {truth.min()} to {truth.max()}, the extractor has classes 0 to {len(classes) - 1}; "
            "evaluate against the data set that the model was trained on"
        )
    return truth


def _balanced_choice(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` images, as evenly over the classes as their sizes allow."""
    order = rng.generator(seed, "choice of real images").permutation(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)  # an image's place among those of its class, in random order
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = np.arange(len(members))
    return order[np.argsort(ranks[order], kind="stable")][:count]
