"""Compares generated images with real ones and writes down how: numbers never travel without their protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfd.data.images import ImageSource
from sfd.evaluation.extractors._base import Extraction, Extractor
from sfd.evaluation.features import concatenated
from sfd.evaluation.metrics import Gaussian, frechet_distance, gaussian, inception_score, precision_recall
from sfd.evaluation.samples import balanced
from sfd.utils import files, rng
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar

NEIGHBOURS = 3  # k of precision and recall
BATCH = 256


class Protocol(Settings):
    """What numbers must be told with: they mean nothing beside numbers of another protocol."""

    reference: str  # which real images
    reference_identity: str
    reference_count: int  # images of the reference that were looked at; 0: none
    stored_moments: bool = False  # Fréchet distances are to moments that came with the reference, of more images
    extractor: str
    extractor_identity: str
    extractor_task: str  # what the extractor was trained to tell
    extractor_accuracy: float | None  # at that, on images it never saw
    neighbours: int = NEIGHBOURS


class Metrics(Settings):
    """One row of the results."""

    name: str  # what was measured ("guided", "real training images")
    real: bool  # real images, not samples
    n_samples: int
    balanced: bool  # every class has equally many samples (or one more)
    frechet_distance: float
    sfid: float | None = None  # Fréchet distance of spatial features; None if extractor or reference has none
    precision: float | None  # None, like recall, if the reference holds no images
    recall: float | None
    inception_score: float | None  # under the extractor's classes; None if it knows none
    class_accuracy: float | None  # None if samples or extractor have no classes
    accuracy_by_class: dict[str, float]  # empty like class_accuracy is None
    protocol: Protocol
    sampling: dict[str, Any]  # how the samples were made: solver, steps, guidance …
    caveats: tuple[str, ...] = ()  # why the numbers cannot be compared with published ones; empty: they can, or never

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        files.write_json(path, self.model_dump(mode="json"))


def read_metrics(path: Path) -> Metrics:
    """Read what `Metrics.write` wrote."""
    return parse(Metrics, files.read_json(path, "folder of metrics"), str(path))


@dataclass(frozen=True)
class Reference:
    """Real images as an extractor sees them, computed once for any number of comparisons."""

    extractor: Extractor
    protocol: Protocol
    classes: tuple[str, ...]
    features: np.ndarray | None  # (N, D); None if only moments are known
    statistics: Gaussian
    spatial: Gaussian | None = None  # of spatial features


def measure(source: ImageSource, extractor: Extractor, name: str) -> Reference:
    """Look at all images of a source; `name` says in a few words which they are."""
    seen = _extract(_batches(source, np.arange(len(source))), len(source), extractor, f"features of {name}")
    protocol = Protocol(
        reference=name,
        reference_identity=source.identity,
        reference_count=len(seen.features),
        extractor=extractor.name,
        extractor_identity=extractor.identity,
        extractor_task=extractor.task,
        extractor_accuracy=extractor.accuracy,
    )
    return Reference(extractor, protocol, tuple(source.classes), seen.features, gaussian(seen.features))


def evaluate(
    samples: np.ndarray | Iterable[np.ndarray],
    labels: Sequence[int] | np.ndarray | None,
    reference: Reference,
    *,
    name: str,
    sampling: Mapping[str, Any] | None = None,
    real: bool = False,
) -> Metrics:
    """Compare images with a reference, through its extractor.

    Args:
        samples: uint8 (N, S, S, 3), or batches of such.
        labels: the class asked for, one an image, indices into the reference's classes; None: images have none.
        reference: what to compare with.
        name: what the samples are, for tables.
        sampling: how they were made, plain values.
        real: these are real images.

    Raises:
        SFDError: too few images, wrong size, labels that do not fit.
    """
    batches, total = samples, 0 if labels is None else len(labels)
    if isinstance(samples, np.ndarray):
        batches, total = [samples], len(samples)
    seen = _extract(batches, total, reference.extractor, f"features of {name}")
    truth = None if labels is None or not reference.classes else np.asarray(labels, dtype=np.int64)
    _check_labels(truth, len(seen.features), reference.classes)
    even = balanced(truth, len(reference.classes))
    return compare(seen, truth, reference.classes, reference, balanced=even, name=name, sampling=sampling, real=real)


def compare(
    seen: Extraction,
    labels: np.ndarray | None,
    classes: Sequence[str],
    reference: Reference,
    *,
    balanced: bool,
    name: str,
    sampling: Mapping[str, Any] | None = None,
    real: bool = False,
    caveats: Sequence[str] = (),
) -> Metrics:
    """Compare what the reference's extractor saw in images; `labels` index `classes`. See `evaluate`."""
    agreement = None
    if reference.features is not None:
        agreement = precision_recall(reference.features, seen.features, NEIGHBOURS)
    accuracy, by_class = _class_accuracy(seen.probabilities, labels, classes, reference.extractor)
    sfid = None
    if reference.spatial is not None and seen.spatial is not None:
        sfid = frechet_distance(reference.spatial, gaussian(seen.spatial))
    return Metrics(
        name=name,
        real=real,
        n_samples=len(seen.features),
        balanced=balanced,
        frechet_distance=frechet_distance(reference.statistics, gaussian(seen.features)),
        sfid=sfid,
        precision=agreement.precision if agreement else None,
        recall=agreement.recall if agreement else None,
        inception_score=None if seen.probabilities is None else inception_score(seen.probabilities),
        class_accuracy=accuracy,
        accuracy_by_class=by_class,
        protocol=reference.protocol,
        sampling=dict(sampling or {}),
        caveats=tuple(caveats),
    )


def evaluate_real(source: ImageSource, reference: Reference, count: int, seed: int = 0) -> Metrics:
    """Measure real training images as if they were samples: the floor that a perfect model would reach.

    Args:
        source: real images, none of them in the reference.
        reference: what to compare with.
        count: how many, as even over the classes as they go; as many as there are samples makes it comparable.
        seed: of the choice.
    """
    chosen = _balanced_choice(np.asarray(source.labels), min(count, len(source)), seed)
    labels = np.asarray(source.labels)[chosen] if source.classes else None
    return evaluate(_batches(source, chosen), labels, reference, name="real training images", real=True)


def _batches(source: ImageSource, indices: np.ndarray) -> Iterable[np.ndarray]:
    return (source.load(indices[start : start + BATCH]) for start in range(0, len(indices), BATCH))


def _extract(batches: Iterable[np.ndarray], total: int, extractor: Extractor, description: str) -> Extraction:
    seen: list[Extraction] = []
    with bar(description, total) as shown:
        for batch in batches:
            for start in range(0, len(batch), BATCH):
                seen.append(extractor.extract(batch[start : start + BATCH]))
                shown.advance(len(seen[-1].features))
    return concatenated(seen)


def _check_labels(labels: np.ndarray | None, count: int, classes: Sequence[str]) -> None:
    if labels is None:
        return
    if labels.shape != (count,):
        raise SFDError(f"got labels of shape {labels.shape} for {count} images; give one label an image")
    if count and (labels.min() < 0 or labels.max() >= len(classes)):
        raise SFDError(
            f"labels run from {labels.min()} to {labels.max()}, the reference has classes 0 to {len(classes) - 1}; "
            "evaluate against the data set that the model was trained on"
        )


def _class_accuracy(
    probabilities: np.ndarray | None, labels: np.ndarray | None, classes: Sequence[str], extractor: Extractor
) -> tuple[float | None, dict[str, float]]:
    """Share of samples taken for the class asked for, overall and by class; (None, {}) where that has no meaning."""
    if probabilities is None or labels is None or tuple(extractor.classes) != tuple(classes):
        return None, {}
    right = probabilities.argmax(axis=1) == labels
    by_class = {name: float(right[labels == i].mean()) for i, name in enumerate(classes) if (labels == i).any()}
    return float(right.mean()), by_class


def _balanced_choice(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` places, as evenly over the classes as their sizes allow."""
    order = rng.generator(seed, "choice of real images").permutation(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)  # an image's place among those of its class, in random order
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = np.arange(len(members))
    return order[np.argsort(ranks[order], kind="stable")][:count]
