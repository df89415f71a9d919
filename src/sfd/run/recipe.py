"""Recipes: everything that a run depends on, in one frozen and checked record.

A recipe is YAML. It may name another one to start from (`extends: other.yaml`, relative to itself, or a shipped
recipe's name); the command line overrides single fields (`train.steps=500`). What results is validated whole before
anything is computed, and saved with the run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from sfd.data.encode import LatentSettings
from sfd.data.source import DataSettings
from sfd.generation.config import SamplingConfig
from sfd.models.dit_config import SIZES
from sfd.models.pca import PCAConfig
from sfd.models.semvae import SemVAEConfig, SemVAEObjective
from sfd.run.inherit import model_defaults, take_tokenizers
from sfd.run.values import apply_override, follow_changes, merge, read_yaml, write_out_names
from sfd.schedule import build_schedule
from sfd.training.config import TrainSettings
from sfd.training.tasks import TASKS
from sfd.training.tasks.classifier import ClassifierSettings
from sfd.training.tasks.diffusion import LossSettings
from sfd.utils import files, registry
from sfd.utils.config import Free, PathText, Settings, parse
from sfd.utils.errors import SFDError, unknown
from sfd.utils.paths import expand_home
from sfd.utils.shipped import find_recipe

MAX_EXTENDS = 8
OF_ONE_RUN = ("note", "published")  # fields that say something of one recipe, and of none that extends it


class EncoderSettings(Settings):
    """An encoder: its kind and settings, and how it is trained, or where a trained one is."""

    name: str = Field(description="a module of sfd.encoders")
    config: dict[str, Any] = Field({}, description="architecture; for a pre-trained encoder, values that it must match")
    objective: dict[str, Any] = Field({}, description="its training loss")
    train: TrainSettings | None = Field(None, description="train it in the run")
    folder: Free[PathText | None] = Field(None, description="a trained encoder's directory")
    pretrained: Free[PathText | None] = Field(
        None, description="a published encoder: a hub name, or a folder in the hub's format"
    )

    @model_validator(mode="after")
    def _check(self) -> EncoderSettings:
        module = registry.find("sfd.encoders", self.name, "encoder")
        if self.pretrained is None:
            parse(module.Config, self.config, f"settings of encoder {self.name!r}")
        for field in self.config:  # of a published encoder only some are given, which must match its own
            if field not in module.Config.model_fields:
                raise unknown("field", field, module.Config.model_fields)
        if (self.train is not None or self.objective) and self.name not in TASKS:
            raise ValueError(f"encoder {self.name!r} cannot be trained here; give `pretrained` or `folder`")
        if self.objective:
            parse(TASKS[self.name].Objective, self.objective, f"objective of encoder {self.name!r}")
        if self.folder is not None and (self.config or self.objective):
            raise ValueError("a trained encoder from `folder` has its own config and objective; leave these out")
        if self.pretrained is not None and not hasattr(module, "pretrained"):
            raise ValueError(f"no {self.name!r} encoder is published; give `train`, or a trained one's `folder`")
        if sum(way is not None for way in (self.train, self.folder, self.pretrained)) != 1:
            raise ValueError(
                "give exactly one of `train` (train one in the run), `folder` (a trained encoder's directory) and "
                "`pretrained` (a hub name, or a folder in the hub's format)"
            )
        return self

    def fixed(self) -> dict[str, Any]:
        """Write out the defaults of `config` and `objective`, so that leaving one out is no difference."""
        module, fields = registry.find("sfd.encoders", self.name, "encoder"), super().fixed()
        if self.train is not None:
            fields["config"] = parse(module.Config, self.config).fixed()
            fields["objective"] = parse(TASKS[self.name].Objective, self.objective).fixed()
        return fields


class CompressorSettings(Settings):
    """The compressor of the encoder's features to the semantic latent: SemVAE or PCA."""

    name: Literal["semvae", "pca"] = "semvae"
    channels: int = Field(8, gt=0, description="of the semantic latent")
    width: int = Field(128, gt=0, description="SemVAE: of its transformer blocks")
    heads: int = Field(4, gt=0, description="SemVAE")
    blocks: int = Field(2, gt=0, description="SemVAE: transformer blocks in encoder and decoder each")
    whiten: bool = Field(False, description="PCA: divide each component by its standard deviation")
    standardize: bool = Field(False, description="PCA: divide each feature by its standard deviation first")
    fit_images: int = Field(4096, gt=0, description="PCA: images that it is fitted on")
    objective: SemVAEObjective = SemVAEObjective()
    train: TrainSettings | None = Field(None, description="SemVAE: train it in the run")
    folder: Free[PathText | None] = Field(
        None, description="a trained compressor's directory, which must match the fields above"
    )

    @model_validator(mode="after")
    def _check(self) -> CompressorSettings:
        if self.name == "semvae" and (self.train is None) == (self.folder is None):
            raise ValueError(
                "a semvae needs either `train` (train it in the run) or `folder` (a trained one's directory)"
            )
        if self.name == "pca" and self.train is not None:
            raise ValueError("`train` is for a semvae, and pca takes none: it is fitted")
        return self

    def config(self, input_channels: int) -> SemVAEConfig | PCAConfig:
        """Give the compressor's architecture for features with this number of channels."""
        kind = SemVAEConfig if self.name == "semvae" else PCAConfig
        values = {name: value for name, value in self if name in kind.model_fields}
        return kind(input_channels=input_channels, latent_channels=self.channels, **values)


class StreamSettings(Settings):
    """How the network treats one stream; channels and grid are those of its latents."""

    weight: float = Field(1.0, ge=0, description="of its channels in the velocity loss")
    patch_size: int = Field(1, gt=0)


class TransformerSettings(Settings):
    """The network's size; the rest of its architecture follows from the latents."""

    size: str = Field("tiny", description=f"one of {', '.join(SIZES)}")
    depth: int | None = Field(None, gt=0, description="instead of that of the size")
    width: int | None = Field(None, gt=0, description="instead of that of the size")
    heads: int | None = Field(None, gt=0, description="instead of that of the size")
    prediction: Literal["velocity", "data"] = Field(
        "velocity", description="what the network gives; losses are the same"
    )
    clocks: Literal["streams", "one"] = Field("streams", description="one time embedder per stream, or one for all")
    repa_block: int | None = Field(2, ge=1, description="block (from 1) whose tokens REPA aligns; null: no projector")
    repa_width: int = Field(2048, gt=0)
    guide_block: int | None = Field(
        None, ge=1, description="block (from 1) after which a second head predicts the guiding velocity; null: none"
    )
    checkpointing: Free[bool | Literal["selective"]] = Field(
        False, description="recompute activations in the backward pass to save memory; selective: only the cheap ones"
    )

    @model_validator(mode="after")
    def _check(self) -> TransformerSettings:
        if self.size not in SIZES:
            raise unknown("transformer size", self.size, SIZES)
        return self


class EvaluationSettings(Settings):
    """How the trained model is sampled and evaluated."""

    samples_per_class: int = Field(64, gt=0, description="of an unconditional model: in all")
    seed: int = Field(0, ge=0, description="image i has seed + i")
    unguided: bool = Field(True, description="also measure samples without guidance")
    classifier: ClassifierSettings | None = Field(
        ClassifierSettings(), description="the evaluation classifier; null: none, use `sfd evaluate`"
    )
    guiding_model: Free[PathText | None] = Field(
        None, description="what sample.guidance_from: guiding_model takes: a model's directory or a run's folder"
    )


class Recipe(Settings):
    """One run, from images to report."""

    name: Free[str] = Field(min_length=1)
    note: Free[str] = Field("", description="purpose, for people")
    published: Free[dict[str, float | None]] = Field(
        {}, description="numbers published for this run, by metric; null: none was published"
    )
    seed: int = Field(0, ge=0)
    data: DataSettings
    texture: EncoderSettings
    semantic: EncoderSettings
    compressor: CompressorSettings
    latents: LatentSettings = LatentSettings()
    streams: dict[str, StreamSettings]
    schedule: dict[str, Any]
    transformer: TransformerSettings = TransformerSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings
    sample: SamplingConfig = SamplingConfig()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for name in self.streams:
            if name not in ("texture", "semantic"):
                raise unknown("stream", name, ("texture", "semantic"))
        if "texture" not in self.streams:
            raise SFDError("streams must hold 'texture', from which pixels are decoded")
        parts = {"texture": self.texture.train, "semantic": self.semantic.train, "compressor": self.compressor.train}
        for name, training in parts.items():
            if training is not None and training.init is not None:
                raise SFDError(f"{name}.train.init: only the transformer starts from weights; give {name}.folder")
        schedule = build_schedule(self.schedule, tuple(self.streams))
        independent = self.loss.times == "independent"
        if self.transformer.clocks == "one" and (schedule.knots or independent):
            given = "loss.times 'independent'" if independent else f"the schedule {self.schedule['name']!r}"
            raise SFDError(
                f"transformer.clocks 'one' gives the network a single time, but {given} "
                "gives each stream its own; use clocks: streams, or the synchronous schedule"
            )
        if self.loss.repa and self.transformer.repa_block is None:
            raise SFDError("loss.repa is set, but transformer.repa_block is null; set it, or set loss.repa to 0")
        self._check_guidance()
        self._check_data()
        return self

    def _check_guidance(self) -> None:
        source, guiding = self.sample.guidance_from, self.evaluation.guiding_model
        if (source == "guiding_model") != (guiding is not None):
            raise SFDError(
                f"sample.guidance_from is {source} and evaluation.guiding_model is {guiding or 'null'}; for "
                "AutoGuidance set the first to guiding_model and the second to that model's folder, else neither"
            )
        block, weight = self.transformer.guide_block, self.loss.guide
        if (block is None) != (weight is None):
            raise SFDError(
                f"transformer.guide_block is {block} and loss.guide is {weight}, but a second head needs both; "
                "give a block and a weight, such as 0.25, or neither"
            )
        if source == "inside" and block is None:
            raise SFDError("sample.guidance_from is inside, which needs transformer.guide_block and loss.guide")

    @property
    def uses_semantics(self) -> bool:
        """Whether a stream or a loss needs a semantic encoder's features."""
        return "semantic" in self.streams or self.loss.repa > 0

    @property
    def encodes_semantics(self) -> bool:
        """Whether the run needs a semantic encoder; with published latents it does not."""
        return self.uses_semantics and self.latents.published is None

    @property
    def compresses_semantics(self) -> bool:
        """Whether the run needs a compressor: for a semantic stream, not for REPA alone."""
        return self.encodes_semantics and "semantic" in self.streams

    def sampling(self, classes: Sequence[str]) -> SamplingConfig:
        """The sampling settings of a model with these classes; without any the null class guides nothing."""
        able = bool(classes) or self.sample.guidance_from != "null_class"
        return self.sample if self.sample.guides and able else self.sample.unguided()

    def fixed(self) -> dict[str, Any]:
        """Write out the defaults of the schedule, so that leaving one out is no difference."""
        return super().fixed() | {"schedule": build_schedule(self.schedule, tuple(self.streams)).spec}

    def _check_data(self) -> None:
        if self.latents.published is not None and self.texture.train is not None:
            raise SFDError(
                "latents.published are another encoder's: a texture encoder trained here would decode them to noise; "
                "give the one that made them, as texture.pretrained or texture.folder"
            )
        if self.data.source is None and self.latents.published is None:
            raise SFDError("data.source is missing; give a folder of images, or latents.published=FOLDER")
        lacking = "data.source is null" if self.data.source is None else "data.holdout is 0"
        if self.evaluation.classifier is not None and (self.data.source is None or self.data.holdout == 0):
            raise SFDError(
                f"evaluation trains its classifier on held-out images, but {lacking}; give it, or set "
                "evaluation.classifier=null"
            )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `extends` followed and overrides applied.

    Args:
        path: the YAML file, or a shipped recipe's name.
        overrides: `dotted.field=value`, the value as YAML.
    """
    own = _read(find_recipe(path), MAX_EXTENDS)
    values = _overridden(merge(_defaults(), own), overrides)
    train = values.get("train")
    if isinstance(train, dict) and train.get("init") is not None:
        init = expand_home(str(train["init"]))
        values = _overridden(merge(_defaults() | model_defaults(init, own), own), overrides)
        take_tokenizers(values, init)
    if isinstance(values.get("streams"), dict):
        # An inherited stream is taken out by `semantic: null`.
        values["streams"] = {name: stream for name, stream in values["streams"].items() if stream is not None}
    follow_changes(values, path.name)
    return parse(Recipe, values, path.name)


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for override in overrides:
        apply_override(values, override, Recipe)
    return values


def _defaults() -> dict[str, Any]:
    """Defaults that a recipe changes field by field."""
    return {
        "streams": {"texture": {}, "semantic": {"weight": 2.0}},
        "schedule": {"name": "offset", "delta": 0.3},
        "evaluation": EvaluationSettings().model_dump(mode="json"),
    }


def dump_recipe(recipe: Recipe) -> str:
    """Write a complete recipe as YAML that reads back as the same recipe."""
    values = recipe.model_dump(mode="json")
    # A stream that every recipe starts with and this one has not must be taken out again on reading.
    values["streams"] |= {name: None for name in _defaults()["streams"] if name not in recipe.streams}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _read(path: Path, depth: int) -> dict[str, Any]:
    if depth == 0:
        raise SFDError(f"{path}: more than {MAX_EXTENDS} recipes extend one another; is one extending itself?")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise files.as_user_error(error, path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SFDError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        if download := files.failed_download(path):
            raise SFDError(f"{path} is {download}")
        raise SFDError(f"{path}: a recipe must be a mapping of fields to values, but {type(values).__name__} was found")
    write_out_names(values, Recipe)
    base = values.pop("extends", None)
    if base is None:
        return values
    beside = path.parent / str(base)
    inherited = _read(beside if beside.is_file() else find_recipe(str(base)), depth - 1)
    for own in OF_ONE_RUN:
        inherited.pop(own, None)
    return merge(inherited, values)
