"""What the study compares: a base recipe for each data set, and arms that change a few of its fields."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import ROOT


class Base(NamedTuple):
    """What the arms of one data set share."""

    recipe: Path
    changes: tuple[str, ...]
    extractor: str | None  # whose features samples are judged in; None: those of the run's evaluation classifier
    embedded: str  # a semantic encoder that the run trains
    other_compressor: str


SIZE = ("train.steps=2400", "train.decay_from=1600", "train.preview_every=400", "train.keep_every=800")
SIZE += ("evaluation.samples_per_class=200", "sample.solver=multistep", "sample.steps=24", "sample.batch_size=250")
SIZE += ("train.warmup=100", "loss.stationary_streams=false")
SIZE += ("transformer={size: tiny, repa_block: 2, repa_width: 256}",)
SEMVAE = (
    "compressor={{name: semvae, channels: {channels}, width: 96, heads: 4, blocks: 1, train: {{steps: 1000, "
    "batch_size: 128, learning_rate: 2.0e-3, warmup: 50, decay: cosine, precision: bf16}}}}"
)

BASES = {
    "shapes": Base(
        ROOT / "recipes/shapes-demo.yaml",
        (
            *SIZE,
            # A classifier's features: what is in the image, and nothing else.
            "semantic.objective={cross_entropy: 3, invariance: 0, variance: 0, covariance: 0}",
            "semantic.train.steps=2000",
            "compressor={name: pca, channels: 8, standardize: true}",
        ),
        None,
        "semantic.objective={}",
        SEMVAE.format(channels=8),
    ),
    "photos": Base(
        ROOT / "recipes/photos-32.yaml",
        (*SIZE, "data.holdout=0.3", "loss.guide=null", "train.ema=0.99", "train.learning_rate=1.0e-3"),
        "efficientnet_lite",
        "semantic={name: convnet, config: {widths: [32, 64, 128]}, train: {steps: 1500, batch_size: 128, "
        "learning_rate: 3.0e-3, warmup: 100, decay: cosine, precision: bf16}}",
        SEMVAE.format(channels=16),
    ),
}


class Arm(NamedTuple):
    """One way to train."""

    name: str
    changes: tuple[str, ...]
    learned: bool = False  # a schedule that a probe of 5 % of the training finds


def offset(delta: float) -> str:
    return f"schedule={{name: offset, delta: {delta:g}}}"


EQUAL_DENSITY = ("loss.density=stream", "loss.base_time=uniform")
ALONE = ("streams.semantic=null", "schedule={name: synchronous}")


def arms(base: Base) -> list[Arm]:
    """All arms of a data set. The base is the offset 0.3."""
    listed = [
        Arm("texture", (*ALONE, "loss.repa=0")),
        Arm("repa", ALONE),
        Arm("offset-0", (offset(0),)),
        Arm("offset-0.3", ()),
        Arm("offset-1", (offset(1),)),
        Arm("arrived", ("loss.arrived=0.75",)),
        Arm("stationary", ("loss.stationary_streams=true",)),
    ]
    listed += [Arm(f"offset-{d:g}", (offset(d),)) for d in (0.1, 0.2, 0.5, 0.7)]
    listed += [Arm("arrived-1", (offset(1), "loss.arrived=0.75"))]
    for delta in (0, 0.3, 1):
        listed += [
            Arm(f"data-{delta:g}", (offset(delta), "transformer.prediction=data")),
            Arm(f"density-{delta:g}", (offset(delta), *EQUAL_DENSITY)),
        ]
    listed += [Arm("learned", EQUAL_DENSITY, learned=True)]
    listed += [Arm("channels-4", ("compressor={name: pca, channels: 4, standardize: true}",))]
    listed += [Arm("compressor", (base.other_compressor,)), Arm("embedded", (base.embedded,))]
    return listed + [Arm(f"weight-{w:g}", (f"streams.semantic.weight={w:g}",)) for w in (0.5, 1, 4)]
