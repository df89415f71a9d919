"""What `sfd evaluate` and `sfd pack` do: judge samples by a run, or by a published extractor against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from sfd.evaluation.evaluate import Metrics, Reference, compare, evaluate
from sfd.evaluation.extractors import inception
from sfd.evaluation.extractors._base import pretrained
from sfd.evaluation.features import Features
from sfd.evaluation.reference import measured, open_reference
from sfd.evaluation.samples import Samples, load_samples, pack
from sfd.run.assessment import reference as run_reference
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.utils import distributed
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError
from sfd.utils.shares import WHOLE, Share, choose_share, own_device

PUBLISHED_COUNT = 50_000  # samples behind a published FID
DISTANCES = {"inception": "FID", "dinov2": "FD-DINOv2"}  # names of the Fréchet distance, by extractor


def evaluate_samples(
    samples: Path, run: Path | None, reference: Path | None, out: Path | None, device: str, **options: Any
) -> None:
    """Judge samples and print the metrics; see `sfd evaluate --help`."""
    share = choose_share(options["part"])
    given = {name: value for name, value in options.items() if value is not None}
    if (run is None) == (reference is None):
        raise SFDError("give either --run RUN, or --reference REF with --extractor, to say what to compare with")
    if out is not None and out.is_dir():
        raise SFDError(f"--out {out} is a folder; give a file's name, such as metrics.json")
    if run is not None:
        if given:
            raise SFDError(
                f"--{next(iter(given)).replace('_', '-')} goes with --reference; a run has its own evaluator"
            )
        distributed.check_single("evaluate --run")
        result: Metrics | None = evaluate_folder(samples, run, choose_device(device))
    else:
        assert reference is not None
        if "extractor" not in given:
            raise SFDError("--reference needs --extractor too; give inception or dinov2")
        given.setdefault("features", (out or samples.absolute()).parent / "features")
        where = choose_device(own_device(device))
        result = evaluate_against(samples, reference, device=where, **given | {"part": share})
    if result is None:
        click.echo(f"part {share} is done; after all, the same command without --part gives the numbers")
        return
    if out is not None:
        result.write(out)
    click.echo(describe(result))


def pack_samples(samples: Path, out: Path) -> None:
    """Write samples as an `.npz`; see `sfd pack --help`."""
    if out.suffix != ".npz":
        raise SFDError(f"{out} is no name of an .npz; give one such as samples.npz")
    loaded = load_samples(samples)
    pack(loaded, out)
    click.echo(f"{len(loaded.images)} images in {out}")


def evaluate_folder(samples: Path, run: Path, device: torch.device) -> Metrics:
    """Judge samples with a run's evaluator and held-out images.

    Raises:
        SFDError: the run has no evaluator or the images do not fit it.
    """
    if not (run / "recipe.yaml").exists():
        raise SFDError(f"{run} is no run's folder: recipe.yaml is missing; give the --out folder of `sfd run`")
    pipeline = Pipeline(load_recipe(run / "recipe.yaml"), run, device)
    loaded = load_samples(samples)
    against = run_reference(pipeline)
    labels = loaded.labels_among(against.classes)
    return evaluate(loaded.batches(), labels, against, name=samples.name, sampling=loaded.sampling)


def evaluate_against(
    samples: Path,
    reference: Path,
    extractor: str,
    features: Path,
    *,
    weights: str | None = None,
    batch_size: int = 64,
    part: Share = WHOLE,
    device: torch.device,
) -> Metrics | None:
    """Judge samples with a published extractor against a reference: an `.npz`, or a folder of images.

    Features are kept in the folder `features`, so that a stopped evaluation goes on where it was. With a `part` of
    several only that share of them is computed, and None is returned.

    Raises:
        SFDError: samples, reference or extractor are not what they should be.
    """
    loaded = load_samples(samples)
    judge = pretrained(extractor, weights, device)
    real = open_reference(reference, loaded.images.image_size, extractor)
    sets = [Features(features, images, judge) for images in (loaded.images, real.images) if images is not None]
    for computed, name in zip(sets, ("samples", "reference"), strict=False):
        computed.compute(batch_size, part, f"features of the {name}")
    if part != WHOLE:
        return None
    against = measured(real, judge, sets[1].read() if len(sets) > 1 else None)
    labels = None if loaded.labels is None else np.asarray(loaded.labels, np.int64)
    return compare(
        sets[0].read(),
        labels,
        loaded.classes,
        against,
        balanced=loaded.balanced,
        name=samples.name,
        sampling=loaded.sampling,
        caveats=_caveats(loaded, against),
    )


def describe(metrics: Metrics) -> str:
    """Write metrics with their protocol as text."""
    protocol = metrics.protocol
    numbers = {DISTANCES.get(protocol.extractor, "Fréchet distance"): f"{metrics.frechet_distance:.3f}"}
    if metrics.sfid is not None:
        numbers["sFID"] = f"{metrics.sfid:.3f}"
    if metrics.inception_score is not None:
        numbers["inception score"] = f"{metrics.inception_score:.3f}"
    if metrics.precision is not None and metrics.recall is not None:
        numbers["precision, recall"] = f"{metrics.precision:.3f}, {metrics.recall:.3f} (k = {protocol.neighbours})"
    if metrics.class_accuracy is not None:
        numbers["class accuracy"] = f"{metrics.class_accuracy:.1%}"
    judge = "" if protocol.extractor_accuracy is None else f"; its own accuracy {protocol.extractor_accuracy:.1%}"
    images = f"{protocol.reference_count} images" if protocol.reference_count else "no images"
    moments = "its stored moments and " if protocol.stored_moments else ""
    facts = {
        "samples": f"{metrics.n_samples}, {'balanced' if metrics.balanced else 'not balanced'}",
        "sampling": ", ".join(f"{k} {v}" for k, v in metrics.sampling.items() if v not in (None, "", {})),
        "reference": f"{protocol.reference} ({protocol.reference_identity}): {moments}{images}",
        "extractor": f"{protocol.extractor_identity} ({protocol.extractor_task}{judge})",
    }
    lines = [f"{name:<18} {text}" for name, text in {**numbers, **facts}.items() if text]
    return "\n".join([*lines, *(f"not comparable with published numbers: {text}" for text in metrics.caveats)])


def _caveats(samples: Samples, reference: Reference) -> list[str]:
    """Say why numbers of a published extractor cannot be compared with published ones."""
    found, protocol, count = [], reference.protocol, len(samples.images)
    if count != PUBLISHED_COUNT:
        found.append(f"{count:,} samples, published FID-50K takes {PUBLISHED_COUNT:,}")
    if not samples.balanced:
        known = "classes are not equally frequent among the samples"
        found.append(known if samples.labels is not None else "nothing says of which classes the samples are")
    distinct = len(set(samples.record.get("seeds") or range(count)))
    if distinct < count:
        found.append(f"{distinct:,} seeds made {count:,} samples, so that noise repeats among classes")
    if protocol.extractor == inception.NAME:
        if not protocol.stored_moments:
            found.append(f"the reference is {protocol.reference_count:,} images, not the moments of a training set")
        if reference.extractor.identity != f"{inception.NAME}-{inception.CHECKSUM[:16]}":
            found.append("the weights are not the published Inception")
    return found
