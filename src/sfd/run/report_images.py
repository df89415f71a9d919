"""Pictures of a report that are no samples: reconstructions, nearest training images, previews of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfd.data.images import to_tensor, to_uint8
from sfd.encoders import TextureEncoder
from sfd.evaluation.report import Gallery
from sfd.generation.folder import grid_rows, read_images
from sfd.run.assessment import EvaluatorStage, SamplesStage
from sfd.run.encoders import EncoderStage
from sfd.run.images import RunImages
from sfd.utils.device import full_float32

SHOWN = 8  # images reconstructed; samples whose neighbours are looked for
NEAREST = 7  # training images of each
SEARCHED = 10_000  # training images, at most, among which neighbours are looked for
BATCH = 250
PREVIEWS = 3


@torch.no_grad()
@full_float32()
def reconstructions(images: RunImages, texture: TextureEncoder, device: torch.device) -> Gallery:
    """Encode and decode some images by the texture autoencoder, held-out ones where there are any."""
    source = images.held_out if len(images.held_out) else images.training
    real = source.load(_spread(len(source), SHOWN))
    decoded = to_uint8(texture.decode(texture.encode(to_tensor(real).to(device))))
    error = np.mean((real.astype(np.float64) - decoded) ** 2)
    kind = "Held-out" if source is images.held_out else "Training"
    caption = f"{kind} images, and the same ones encoded and decoded: no sample is sharper"
    if error:
        caption += f". PSNR {10 * np.log10(255**2 / error):.1f} dB"
    return Gallery("Real images through the autoencoder", caption, [("real", real), ("decoded", decoded)])


def nearest(
    samples: SamplesStage, images: RunImages, evaluator: EvaluatorStage, semantic: EncoderStage
) -> Gallery | None:
    """Find the training images that are nearest to some samples; None without a network to compare by."""
    if evaluator.needed():
        features = "features of the evaluation classifier"

        def extract(batch: np.ndarray) -> np.ndarray:
            return evaluator.extractor.extract(batch).features

    elif samples.run.recipe.encodes_semantics:
        features = "mean features of the semantic encoder"

        @torch.no_grad()
        @full_float32()
        def extract(batch: np.ndarray) -> np.ndarray:
            encoded = semantic.encoder.encode(to_tensor(batch).to(samples.run.device))
            return np.asarray(encoded.float().mean(dim=(2, 3)).cpu())

    else:
        return None
    rows, training = grid_rows(samples.labels), images.training
    rows = [rows[i] for i in _spread(len(rows), SHOWN)]
    shown = read_images(samples.folder, [numbers[0] for _, numbers in rows])
    searched = _spread(len(training), SEARCHED)
    batches = np.array_split(searched, -(-len(searched) // BATCH))
    known = np.concatenate([extract(training.load(batch)) for batch in batches])
    pairs = []
    for (label, _), sample, feature in zip(rows, shown, extract(shown), strict=True):
        distances = np.square(known - feature).sum(axis=1)
        found = searched[np.argsort(distances, kind="stable")[:NEAREST]]
        name = (*samples.model.classes, "")[label]
        pairs.append((name, np.concatenate([sample[None], training.load(found)])))
    among = f"{len(searched):,} of {len(training):,}" if len(searched) < len(training) else f"all {len(training):,}"
    caption = f"A {samples.variant} sample (framed) and its nearest among {among} training images, by {features}"
    return Gallery("Nearest training images", caption, pairs, framed=True)


def previews(training: Path) -> list[tuple[str, Image.Image]]:
    """Open the first, a middle and the last grid of samples of a training."""
    found = sorted((training / "previews").glob("step-*.png"))
    chosen = [found[i] for i in _spread(len(found), PREVIEWS)]
    return [(f"step {int(path.stem.removeprefix('step-')):,}", Image.open(path)) for path in chosen]


def _spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of `count` indices, evenly spaced, with the last one."""
    return np.unique(np.linspace(count - 1, 0, min(count, wanted)).round().astype(np.int64))
