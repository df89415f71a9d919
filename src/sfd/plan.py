"""What a recipe will build, known and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from sfd import registry
from sfd.config import EncoderSettings, Recipe
from sfd.encoders import SEMANTIC, TEXTURE, load_encoder
from sfd.errors import SFDError
from sfd.generate import check_sampling
from sfd.models.convnet import ConvNet
from sfd.models.pca import PCA
from sfd.models.semvae import SemVAE
from sfd.models.transformer import SIZES, TransformerConfig
from sfd.schedules import Schedule, build_schedule
from sfd.settings import Settings, explain, parse
from sfd.streams import Composite, Stream
from sfd.weights import Part


def check(recipe: Recipe) -> TransformerConfig:
    """Plan the whole run, so that parts that do not fit are found before hours of work.

    Returns:
        the planned network.

    Raises:
        SFDError: an architecture that cannot be, streams that share no token grid, features that do not fit REPA, an
            image size that does not fit an encoder or the evaluator, or a way of sampling that makes no sense.
    """
    try:
        config = planned_architecture(recipe)
        planned_compressor(recipe)
        _check_evaluator(recipe)
    except (ValidationError, ValueError) as error:
        raise explain(error, TransformerConfig, f"recipe {recipe.name!r}") from None
    composite = config.composite
    check_sampling(build_schedule(recipe.schedule, composite.names), composite, recipe.sample, has_weak=True)
    if recipe.loss.repa:
        _check_repa(recipe, composite)
    return config


def planned_architecture(recipe: Recipe) -> TransformerConfig:
    """Derive the network from the recipe alone.

    Classes that `data.classes` does not tell are known only with the data, and count as 0.
    """
    texture, semantic = planned_encoder(recipe.texture), planned_encoder(recipe.semantic)
    for stream, encoder, kind in (("texture", texture, TEXTURE), ("semantic", semantic, SEMANTIC)):
        if encoder.kind != kind:
            raise SFDError(f"{stream}: {encoder.name!r} is a {encoder.kind}, but a {kind} is needed; name another")
    shapes = {
        "texture": (texture.channels, texture.downsample),
        "semantic": (recipe.compressor.channels, semantic.downsample),
    }
    for name, (_, downsample) in shapes.items():
        _check_size(recipe, f"{name} encoder", downsample)
    tile = getattr(semantic, "tile", 1)
    if recipe.data.image_size % tile:
        raise SFDError(
            f"data.image_size is {recipe.data.image_size}, but the semantic encoder reads tiles of {tile} pixels; "
            f"choose a multiple of {tile}, or set semantic.config.tile"
        )
    composite = Composite(
        streams=tuple(
            Stream(
                name=name,
                channels=shapes[name][0],
                grid=recipe.data.image_size // shapes[name][1],
                patch_size=stream.patch_size,
                weight=stream.weight,
            )
            for name, stream in recipe.streams.items()
        )
    )
    return architecture(recipe, composite, recipe.data.classes or 0, semantic.channels)


def architecture(recipe: Recipe, composite: Composite, num_classes: int, features: int | None) -> TransformerConfig:
    """Join the recipe's network with the streams that it works on."""
    given = recipe.transformer
    size = SIZES[given.size]
    repa = bool(recipe.loss.repa)
    schedule = build_schedule(recipe.schedule, composite.names)
    return TransformerConfig(
        depth=given.depth or size.depth,
        width=given.width or size.width,
        heads=given.heads or size.heads,
        composite=composite,
        num_classes=num_classes,
        clocks=leading_first(schedule) if given.clocks == "streams" else (),
        repa_block=given.repa_block if repa else None,
        repa_width=given.repa_width,
        repa_channels=features if repa else None,
        checkpointing=given.checkpointing,
    )


def leading_first(schedule: Schedule) -> tuple[str, ...]:
    """Order streams as the published time embedding does: those ahead first; on a par, texture last."""
    middle = schedule.at(torch.tensor(0.5, dtype=torch.float64)).time.tolist()
    ahead = dict(zip(schedule.streams, middle, strict=True))
    backwards = schedule.streams[::-1]
    return tuple(sorted(backwards, key=lambda name: -ahead[name]))


def planned_encoder(settings: EncoderSettings) -> Any:
    """Build an encoder without memory for its weights, or load the one whose `folder` the recipe names.

    Raises:
        SFDError: a trained one is damaged, or the architecture of a published one cannot be known here.
    """
    if settings.folder is not None:
        return load_encoder(Path(settings.folder))
    module = registry.find("sfd.encoders", settings.name, "encoder")
    if settings.pretrained is not None:
        config = module.planned(settings.pretrained, settings.config)
    else:
        config = parse(module.Config, settings.config)
    return _without_memory(module.build, module.Config, config.model_dump_json())


@lru_cache(maxsize=16)
def _without_memory(build: Callable[[Any], Part], config: type[Settings], values: str) -> Part:
    with torch.device("meta"):
        return build(config.model_validate_json(values))


def planned_compressor(recipe: Recipe) -> Part | None:
    """Build the compressor without memory for its weights; None where no semantic stream is generated."""
    if "semantic" not in recipe.streams:
        return None
    channels = planned_encoder(recipe.semantic).channels
    with torch.device("meta"):
        if recipe.compressor.name == "pca":
            return PCA(recipe.compressor.pca(channels))
        return SemVAE(recipe.compressor.semvae(channels))


def _check_evaluator(recipe: Recipe) -> None:
    if recipe.evaluation.classifier is not None:
        with torch.device("meta"):
            evaluator = ConvNet(recipe.evaluation.classifier.network)
        _check_size(recipe, "evaluation classifier", evaluator.config.downsample)


def _check_size(recipe: Recipe, what: str, downsample: int) -> None:
    if recipe.data.image_size % downsample:
        raise SFDError(
            f"data.image_size is {recipe.data.image_size}, but the {what} shrinks images by {downsample}; "
            f"choose a multiple of {downsample}"
        )


def _check_repa(recipe: Recipe, composite: Composite) -> None:
    if not recipe.latents.features:
        raise SFDError("loss.repa needs the encoder's features; set latents.features=true, or loss.repa=0")
    grid = recipe.data.image_size // planned_encoder(recipe.semantic).downsample
    if grid != composite.token_grid:
        raise SFDError(
            f"loss.repa aligns tokens with features, but tokens are on a grid of {composite.token_grid} rows and "
            f"features on one of {grid}; choose patch sizes that make these equal, or set loss.repa=0"
        )
