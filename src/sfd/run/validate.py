"""Resolve and validate a recipe before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import torch
from pydantic import ValidationError

from sfd import encoders
from sfd.data.published import KEYS, read_shards
from sfd.data.shapes import CLASSES
from sfd.data.shards import FEATURES
from sfd.encoders import SEMANTIC, TEXTURE, EncoderConfig
from sfd.generation.directory import model_config
from sfd.latents import CompositeLatent, Stream
from sfd.models.component import Component
from sfd.models.compressor import Compressor, load_compressor
from sfd.models.dit_config import SIZES, DiTConfig
from sfd.models.inference import require_compiler
from sfd.models.pca import PCA, PCAConfig
from sfd.models.semvae import SemVAE
from sfd.models.warm_start import check_width
from sfd.run.recipe import CompressorSettings, EncoderSettings, Recipe
from sfd.schedule import Schedule, build_schedule
from sfd.training.trainer import check_settings
from sfd.utils.config import explain
from sfd.utils.errors import SFDError


def check(recipe: Recipe, *, dry: bool = False) -> DiTConfig:
    """Plan the whole run, so that misfits are found before hours of work.

    Args:
        recipe: what to plan.
        dry: published latents may be absent; they are then assumed to be those of the recipe's encoders.

    Returns:
        the planned network.
    """
    if recipe.latents.published is not None and not dry:
        read_shards(Path(recipe.latents.published))
    try:
        config = planned_architecture(recipe)
        planned_compressor(recipe)
    except (ValidationError, ValueError) as error:
        raise explain(error, DiTConfig, f"recipe {recipe.name!r}") from None
    recipe.sample.check(build_schedule(recipe.schedule, config.composite.names), config.composite, has_guiding=True)
    if recipe.loss.repa:
        _check_repa(recipe, config.composite)
    return config


def check_out(recipe: Recipe, out: Path) -> None:
    """Refuse a run's folder that is, contains or is inside a folder of the recipe's data."""
    where = out.resolve()
    for field, source in (("data.source", recipe.data.source), ("latents.published", recipe.latents.published)):
        if source is None or source == "shapes" or not Path(source).is_dir():
            continue
        folder = Path(source).resolve()
        if where == folder or where in folder.parents or folder in where.parents:
            relation = "is" if where == folder else "contains" if where in folder.parents else "is inside"
            raise SFDError(f"--out {out} {relation} {field}, the folder {source}; give a folder apart from the data")


def check_models(recipe: Recipe) -> None:
    """Refuse models to start from or to guide by that are not there or do not fit, before hours of work."""
    named = {"evaluation.guiding_model": recipe.evaluation.guiding_model, "train.init": recipe.train.init}
    for field, given in named.items():
        try:
            config = model_config(given) if given is not None else None
            if config is not None and field == "train.init":
                check_width(planned_architecture(recipe), config)
        except SFDError as error:
            raise SFDError(f"{field}: {error}") from None


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Refuse a run that this machine cannot finish."""
    parts = [recipe.texture, recipe, *((recipe.semantic, recipe.compressor) if recipe.encodes_semantics else ())]
    trainings = [part.train for part in parts]
    if recipe.evaluation.classifier is not None:
        trainings.append(recipe.evaluation.classifier.training)
    for settings in trainings:
        if settings is not None:
            check_settings(settings, device)
    if recipe.sample.compile:
        require_compiler(device)


def planned_architecture(recipe: Recipe) -> DiTConfig:
    """Derive the network from the recipe alone.

    Without `data.classes` the number of classes is known only with the data, and counts as 0; of shapes it is known.
    """
    shapes = planned_shapes(recipe)
    streams = [
        Stream(name=name, **shapes[name]._asdict(), patch_size=stream.patch_size, weight=stream.weight)
        for name, stream in recipe.streams.items()
    ]
    features = shapes[FEATURES].channels if FEATURES in shapes else None
    classes = recipe.data.classes or (len(CLASSES) if recipe.data.source == "shapes" else 0)
    return architecture(recipe, CompositeLatent(streams=tuple(streams)), classes, features)


class Shape(NamedTuple):
    """Shape of a latent."""

    channels: int
    grid: int

    def __str__(self) -> str:
        return f"{self.channels} channels on {self.grid}×{self.grid}"


def planned_shapes(recipe: Recipe) -> dict[str, Shape]:
    """Derive the shape of each stream, and of the features, from the encoders or from published shards."""
    texture = _encoded(recipe, recipe.texture, TEXTURE)
    if recipe.latents.published is not None and Path(recipe.latents.published).is_dir():
        return _published_shapes(recipe, Path(recipe.latents.published), texture)
    if not recipe.uses_semantics:
        return {"texture": texture}
    features = _encoded(recipe, recipe.semantic, SEMANTIC)
    return {"texture": texture, "semantic": Shape(recipe.compressor.channels, features.grid), FEATURES: features}


def _encoded(recipe: Recipe, settings: EncoderSettings, kind: str) -> Shape:
    """Shape of what an encoder makes of the recipe's images."""
    encoder, size = planned_encoder(settings), recipe.data.image_size
    if encoder.kind != kind:
        given = f"{settings.folder} holds" if settings.folder is not None else f"{settings.name!r} is"
        raise SFDError(f"{given} a {encoder.kind}, but a {kind} is needed; name another")
    tile = getattr(encoder, "tile", encoder.downsample)
    if size % tile:
        raise SFDError(
            f"data.image_size is {size}, but the {kind} takes tiles of {tile} pixels; choose a multiple of "
            f"{tile}{', or set semantic.config.tile' if kind == SEMANTIC else ''}"
        )
    return Shape(encoder.channels, size // encoder.downsample)


def _published_shapes(recipe: Recipe, folder: Path, decoded: Shape) -> dict[str, Shape]:
    entries = read_shards(folder)[0].entries
    shapes = {name: Shape(*entries[key].shape[1:3]) for name, key in KEYS.items() if key in entries}
    if shapes["texture"] != decoded:
        raise SFDError(
            f"{folder} holds texture latents of {shapes['texture']}, but the texture encoder decodes {decoded} for "
            f"data.image_size {recipe.data.image_size}; name the encoder and the image size that they were made with"
        )
    for name in recipe.streams:
        if name not in shapes:
            raise SFDError(f"{folder} holds no {name} latents ({KEYS[name]}); take it out with streams.{name}=null")
    if recipe.loss.repa and FEATURES not in shapes:
        raise SFDError(f"{folder} holds no features ({KEYS[FEATURES]}), which loss.repa needs; set loss.repa=0")
    return shapes


def latent_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes per image in the shards, in both orientations: of latents, and of features."""
    shapes, orientations = planned_shapes(recipe), 2
    entry, half = getattr(torch, recipe.latents.dtype).itemsize, torch.float16.itemsize
    sizes = {name: orientations * shape.channels * shape.grid**2 for name, shape in shapes.items()}
    return entry * sum(sizes[name] for name in recipe.streams), half * sizes.get(FEATURES, 0) * recipe.latents.features


def architecture(recipe: Recipe, composite: CompositeLatent, num_classes: int, features: int | None) -> DiTConfig:
    """The network's configuration for the recipe and its streams."""
    given = recipe.transformer
    size = SIZES[given.size]
    repa = bool(recipe.loss.repa)
    schedule = build_schedule(recipe.schedule, composite.names)
    return DiTConfig(
        depth=given.depth or size.depth,
        width=given.width or size.width,
        heads=given.heads or size.heads,
        composite=composite,
        num_classes=num_classes,
        prediction=given.prediction,
        clocks=leading_first(schedule) if given.clocks == "streams" else (),
        guide_block=given.guide_block,
        repa_block=given.repa_block if repa else None,
        repa_width=given.repa_width,
        repa_channels=features if repa else None,
        checkpointing=given.checkpointing,
    )


def leading_first(schedule: Schedule) -> tuple[str, ...]:
    """Order streams as the published time embedding: leading streams first, texture last among equals."""
    middle = schedule.at(torch.tensor(0.5, dtype=torch.float64)).time.tolist()
    ahead = dict(zip(schedule.streams, middle, strict=True))
    backwards = schedule.streams[::-1]
    return tuple(sorted(backwards, key=lambda name: -ahead[name]))


def planned_encoder(settings: EncoderSettings) -> EncoderConfig:
    """Configuration of the encoder that a recipe names; nothing is built or downloaded."""
    return encoders.planned_encoder(settings.name, settings.pretrained, settings.folder, settings.config)


def planned_compressor(recipe: Recipe) -> Component | None:
    """Build the compressor without memory for its weights; None if there are no semantic latents."""
    if not recipe.compresses_semantics:
        return None
    channels = planned_encoder(recipe.semantic).channels
    if recipe.compressor.folder is not None and Path(recipe.compressor.folder).is_dir():
        return cast(Component, given_compressor(recipe.compressor, channels))
    config = recipe.compressor.config(channels)
    with torch.device("meta"):
        return PCA(config) if isinstance(config, PCAConfig) else SemVAE(config)


def given_compressor(settings: CompressorSettings, input_channels: int) -> Compressor:
    """Load the compressor whose `folder` a recipe names, for features with this number of channels."""
    compressor = load_compressor(Path(str(settings.folder)))
    part = cast(Component, compressor)
    if part.name != settings.name:
        raise SFDError(
            f"compressor.name is {settings.name!r}, but {settings.folder} holds a {part.name}; name that one"
        )
    for field, expected in settings.config(input_channels):
        found = getattr(part.config, field)
        if found != expected:
            raise SFDError(
                f"{settings.folder} holds a {part.name} with {field} = {found}, but {expected} is expected, by the "
                "recipe's compressor and semantic encoder; change the recipe, or give another folder"
            )
    return compressor


def _check_repa(recipe: Recipe, composite: CompositeLatent) -> None:
    if not recipe.latents.features:
        raise SFDError("loss.repa needs the encoder's features; set latents.features=true, or loss.repa=0")
    grid = planned_shapes(recipe)[FEATURES].grid
    if grid != composite.token_grid:
        raise SFDError(
            f"loss.repa aligns tokens with features, but tokens are on a grid of {composite.token_grid} rows and "
            f"features on one of {grid}; choose patch sizes that make these equal, or set loss.repa=0"
        )
