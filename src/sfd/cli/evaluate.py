"""`sfd evaluate` and `sfd pack`: compare samples with a run's held-out images or with a given reference."""

from __future__ import annotations

from pathlib import Path

import click

from sfd.evaluation.evaluate import Metrics, evaluate, read_metrics
from sfd.evaluation.extractors import inception
from sfd.evaluation.extractors._base import PUBLISHED, Extractor, pretrained
from sfd.evaluation.features import extract
from sfd.evaluation.npz import RECORD, Npz
from sfd.evaluation.reference import Reference, open_reference
from sfd.evaluation.samples import Samples, load_samples, pack
from sfd.generation.card import METRICS
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import Recipe, load_recipe
from sfd.utils import files
from sfd.utils.device import choose_device
from sfd.utils.distributed import local_device
from sfd.utils.errors import SFDError

PUBLISHED_COUNT = 50_000  # samples behind a published FID
DISTANCES = {"inception": "FID", "dinov2": "FD-DINOv2"}  # names of the Fréchet distance, by extractor


def evaluate_samples(
    samples: Path,
    run: Path | None,
    reference: Path | None,
    extractor: str | None,
    weights: str | None,
    image_size: int | None,
    features: Path | None,
    batch_size: int,
    out: Path | None,
    device: str,
) -> None:
    """Compare samples with real images and print the metrics; see `sfd evaluate --help`."""
    if (run is None) == (reference is None):
        raise SFDError("give either --run RUN, or --reference REF with --extractor, to say what to compare with")
    if run is not None and (extractor or weights):
        raise SFDError("--extractor and --weights go with --reference; a run has its own classifier")
    if reference is not None and extractor is None:
        raise SFDError(f"--reference needs --extractor too; give one of {', '.join(PUBLISHED)}")
    if out is not None and out.is_dir():
        raise SFDError(f"--out {out} is a folder; give a file's name, such as metrics.json")
    if out is not None:
        files.check_replaceable(out, lambda path: bool(read_metrics(path)), "a file of metrics")
    loaded = load_samples(samples, image_size)
    chosen = choose_device(local_device(device))
    network: Extractor
    if run is not None:
        pipeline = Pipeline(_recipe(run), run, chosen)
        network, real = pipeline.evaluator.extractor, pipeline.evaluator.reference_images()
    else:
        assert reference is not None and extractor is not None
        network = pretrained(extractor, weights, chosen)
        real = open_reference(reference, loaded.images.image_size, extractor)
    labels = loaded.labels_among(network.classes)
    cache = features
    if cache is None and run is None:
        cache = (out or samples.absolute()).parent / "features"
    seen = extract(loaded.images, network, "features of the samples", cache=cache, batch_size=batch_size)
    against = Reference.of(real, network, cache=cache, batch_size=batch_size)
    if seen is None or against is None:
        click.echo(f"this rank's features are in {cache}; the last rank to end gives the numbers")
        return
    found = evaluate(seen, labels, against, name=samples.name, sampling=loaded.sampling)
    if run is None:
        doubts = {"balanced": loaded.balanced, "not_comparable": _not_comparable(loaded, against)}
        found = found.model_copy(update=doubts)
    if out is not None:
        found.write(out)
    click.echo(describe(found))


def _recipe(run: Path) -> Recipe:
    """Read a run's recipe; its images must be there, to be compared with."""
    path = run / "recipe.yaml"
    if not path.exists():
        raise SFDError(f"{run} is not a run's folder: recipe.yaml is missing; give the --out folder of `sfd run`")
    recipe = load_recipe(path)
    source = recipe.data.source
    if source is not None and source != "shapes" and not Path(source).exists():
        raise SFDError(
            f"the images of {run} were in {source}, which is not there; if they were moved, say so once: "
            f"sfd run {run} data.source=NEW_FOLDER"
        )
    return recipe


def pack_samples(samples: Path, out: Path) -> None:
    """Write samples as an `.npz`; see `sfd pack --help`."""
    if out.suffix != ".npz":
        raise SFDError(f"{out} is not the name of an .npz file; give one such as samples.npz")
    files.check_replaceable(out, lambda path: RECORD in Npz(path).names, "an archive of samples")
    loaded = load_samples(samples)
    pack(loaded, out)
    click.echo(f"{len(loaded.images)} images in {out}")


def describe(metrics: Metrics) -> str:
    """Format metrics with intervals, protocol and caveats."""
    protocol = metrics.protocol
    names = METRICS | {metric: f"{metric} (k = {protocol.neighbours})" for metric in ("precision", "recall")}
    names["frechet_distance"] = DISTANCES.get(protocol.extractor, names["frechet_distance"])
    rows = {}
    for metric, (low, high) in metrics.intervals.items():
        doubtful = "  not reliable, see below" if metric in metrics.caveats else ""
        rows[names[metric]] = f"{getattr(metrics, metric):.3f}  (95 %: {low:.3f} to {high:.3f}){doubtful}"
    accuracy = "" if protocol.extractor_accuracy is None else f"; its own accuracy {protocol.extractor_accuracy:.1%}"
    images = f"{protocol.reference_count:,} images" if protocol.reference_count else "no images"
    moments = "its stored moments and " if protocol.stored_moments else ""
    rows |= {
        "samples": f"{metrics.n_samples:,}, {'balanced' if metrics.balanced else 'not balanced'}",
        "sampling": ", ".join(f"{k} {v}" for k, v in metrics.sampling.items() if v not in (None, "", {})),
        "reference": f"{protocol.reference} ({protocol.reference_identity}): {moments}{images}",
        "extractor": f"{protocol.extractor_identity} ({protocol.extractor_task}{accuracy})",
    }
    lines = [f"{name:<18} {text}" for name, text in rows.items() if text]
    reasons = dict.fromkeys(reason for caveats in metrics.caveats.values() for reason in caveats)
    lines += [f"not reliable: {reason}" for reason in reasons]
    return "\n".join([*lines, *(f"not comparable with published numbers: {text}" for text in metrics.not_comparable)])


def _not_comparable(samples: Samples, reference: Reference) -> tuple[str, ...]:
    """List the reasons why metrics of a published extractor are not comparable with published ones."""
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
    return tuple(found)
