"""The stage that gives a run its latents: made of its images, or published by others and used where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sfd.data.encode import Preparation
from sfd.data.grid import image_grid
from sfd.data.images import to_uint8
from sfd.data.published import describe_published, identity, statistics_files
from sfd.data.shards import FEATURES, MANIFEST, LatentSet, read_manifest
from sfd.generation.model import TEXTURE_STREAM
from sfd.run.recipe import Recipe, load_recipe
from sfd.run.stages import RunFolder, Stage, pick
from sfd.run.validate import latent_bytes, planned_shapes
from sfd.utils import files
from sfd.utils.device import measured
from sfd.utils.progress import console
from sfd.utils.shares import WHOLE, Share

if TYPE_CHECKING:
    from sfd.run.pipeline import Pipeline

REAL_PREVIEW, REAL_IMAGES, REAL_COLUMNS = "real.png", 32, 8
# Seconds that one of several processes waits for another to count up what is made.
PATIENCE = 60.0


def latents_stage(pipeline: Pipeline) -> Stage:
    """Describe the stage: what the latents are made from, or which published ones they are."""
    folder, manifest = pipeline.folder.latents, pipeline.folder.latents / MANIFEST
    if pipeline.recipe.latents.published is not None:
        published = Path(pipeline.recipe.latents.published)
        return Stage("latents", "sfd prepare", folder, {}, lambda: _adopted(pipeline, published), results=(manifest,))
    fields = pick(pipeline.fixed, "data", "latents")
    shards = read_manifest(folder).shards if manifest.exists() else ()
    results = (manifest, *(folder / shard.file for shard in shards))
    return Stage("latents", "sfd prepare", folder, fields, lambda: _made_from(pipeline), results=results)


def _made_from(pipeline: Pipeline) -> dict[str, Any]:
    return pipeline.data_identity() | {"tokenizers": pipeline.tokenizers}


def _adopted(pipeline: Pipeline, published: Path) -> dict[str, Any]:
    return {
        "published": identity(published),
        "statistics": {name: files.checksum(path) for name, path in statistics_files(published).items()},
        "tokenizers": _known_tokenizers(pipeline),
    }


def open_latents(pipeline: Pipeline) -> LatentSet:
    """Open the run's latents.

    Raises:
        SFDError: they are not prepared, or not what they were.
    """
    pipeline.latents_stage.require()
    return _open(pipeline.recipe, pipeline.folder)


def find_latents(folder: Path) -> LatentSet:
    """Open the latents of a run's folder, or a folder of latents itself.

    Raises:
        SFDError: it is neither.
    """
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        return LatentSet(folder)
    return _open(load_recipe(recipe), RunFolder(folder))


def _open(recipe: Recipe, folder: RunFolder) -> LatentSet:
    published = recipe.latents.published
    return LatentSet(folder.latents) if published is None else LatentSet(Path(published), read_manifest(folder.latents))


def prepare_latents(pipeline: Pipeline, share: Share = WHOLE) -> None:
    """Encode the training images into shards, or check published ones and keep their statistics.

    Args:
        pipeline: the run.
        share: which shards to make. One of several goes beside other processes, and holds the run's folder only
            to count up: whoever finds all shards made writes the manifest.
    """
    stage = pipeline.latents_stage
    if pipeline.recipe.latents.published is not None:
        pipeline.carry_out(stage, lambda: _adopt(pipeline))
    elif share == WHOLE or stage.finished():
        pipeline.carry_out(stage, lambda: _make(pipeline, share).finish())
    else:
        _make_part(pipeline, stage, share)


def _make_part(pipeline: Pipeline, stage: Stage, share: Share) -> None:
    with files.exclusive(pipeline.folder.root, wait=PATIENCE):
        stage.begin(pipeline.save_recipe)
    with measured(pipeline.device) as usage:
        preparation = _make(pipeline, share)
    with files.exclusive(pipeline.folder.root, wait=PATIENCE):
        if stage.finished():
            return
        stage.add_elapsed(usage.seconds)
        missing = preparation.missing()
        if missing:
            left = f"{len(missing)} of {len(preparation.shards)} shards are left to the other parts"
            console.print(f"part {share.number}/{share.of} is done; {left}", markup=False, soft_wrap=True)
        else:
            pipeline.carry_out(stage, preparation.finish)


def _preparation(pipeline: Pipeline) -> Preparation:
    return Preparation(pipeline.images[0], pipeline.tokenizers, pipeline.folder.latents, pipeline.recipe.latents)


def _make(pipeline: Pipeline, share: Share) -> Preparation:
    preparation = _preparation(pipeline)
    images = sum(len(preparation.indices(number)) for number in preparation.missing())
    needed = images * sum(latent_bytes(pipeline.recipe))
    console.print(f"{images:,} images to encode, {needed / 2**20:,.1f} MiB on disk", markup=False, soft_wrap=True)
    otherwise = "leave the features out (latents.features=false, loss.repa=0)"
    files.check_space(pipeline.folder.latents, needed, otherwise)
    preparation.make(lambda batch: _encode(pipeline, batch), pipeline.device, share)
    return preparation


def _encode(pipeline: Pipeline, images: Tensor) -> dict[str, Tensor]:
    features = pipeline.semantic.encode(images)
    latents = {TEXTURE_STREAM: pipeline.texture.encode(images)}
    if "semantic" in pipeline.recipe.streams:
        latents["semantic"] = pipeline.compressor.encode(features)
    return latents | {FEATURES: features}


def _adopt(pipeline: Pipeline) -> None:
    """Check published latents and write down what they are, with the statistics used from now on."""
    recipe = pipeline.recipe
    planned_shapes(recipe)  # refuses what does not fit the recipe
    manifest = describe_published(
        Path(str(recipe.latents.published)), tokenizers=_known_tokenizers(pipeline), classes=recipe.data.classes
    )
    files.write_json(pipeline.folder.latents / MANIFEST, manifest.model_dump(mode="json"))


def _known_tokenizers(pipeline: Pipeline) -> dict[str, str]:
    """What made published latents, as far as the recipe vouches for it: the shards do not say."""
    return {TEXTURE_STREAM: pipeline.texture.identity}


def write_real_preview(pipeline: Pipeline, latents: LatentSet) -> None:
    """Decode some of the latents beside the training's previews: noise here means another encoder's latents."""
    path = pipeline.folder.training / "previews" / REAL_PREVIEW
    chosen = np.unique(np.linspace(0, len(latents) - 1, REAL_IMAGES).astype(np.int64))
    raw = latents.read(TEXTURE_STREAM, chosen, np.zeros(len(chosen), bool)).to(pipeline.device)
    with torch.no_grad():
        images = to_uint8(pipeline.texture.decode(raw))
    with files.atomic_write(path, shared=True) as partial:
        image_grid(images, columns=REAL_COLUMNS).save(partial, "PNG")
    if pipeline.recipe.latents.published is not None:
        console.print(f"look whether these are images, not noise: {path}", markup=False, soft_wrap=True)
