"""A run from images to model, stage by stage; each stage can be called alone and is done once.

    images → texture encoder ┐
           → semantic encoder → compressor → latents → transformer → model

Every stage writes into its own folder of the run and records what it was made from, so that the same command goes on
where it stopped and another recipe in the same folder is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sfd import files, randomness, registry, stages
from sfd.config import EncoderSettings, Recipe, dump_recipe
from sfd.data.cache import cached
from sfd.data.images import ImageSource, to_tensor
from sfd.data.latents import FEATURES, MANIFEST, LatentSet, prepare
from sfd.data.open import open_source
from sfd.data.split import split
from sfd.encoders import SemanticEncoder, TextureEncoder, load_semantic_encoder, load_texture_encoder
from sfd.errors import SFDError
from sfd.evaluation.extractors import classifier
from sfd.generate import SampleSettings, generate, without_guidance
from sfd.model import Model, load_model
from sfd.models.compressor import Compressor, load_compressor
from sfd.models.pca import fit_pca
from sfd.models.semvae import SemVAE
from sfd.models.transformer import SIZES, Transformer, TransformerConfig, parameter_count
from sfd.schedules import Schedule, build_schedule
from sfd.settings import parse
from sfd.streams import Composite
from sfd.training.diffusion import DiffusionTask
from sfd.training.loop import FREE_TO_CHANGE, TrainSettings, fit
from sfd.training.semvae import SemVAETask

PREVIEW_IMAGES = 32


class Pipeline:
    """The stages of one run."""

    def __init__(self, recipe: Recipe, root: Path, device: torch.device) -> None:
        self.recipe, self.folder, self.device = recipe, stages.RunFolder(root), device

    def all(self) -> None:
        """Do every stage up to the model and its evaluator."""
        self.train_texture()
        self.train_semantic()
        self.train_compressor()
        self.prepare()
        self.train()
        self.train_evaluator()

    def save_recipe(self) -> None:
        """Keep the resolved recipe with the run."""
        files.write_text(self.folder.recipe, dump_recipe(self.recipe))

    @cached_property
    def images(self) -> tuple[ImageSource, ImageSource]:
        """The images to train on and those held out, in memory where they fit."""
        whole = cached(open_source(self.recipe.data))
        return split(whole, self.recipe.data.holdout, self.recipe.data.seed)

    def train_texture(self) -> None:
        """Train the texture encoder."""
        self._train_encoder("texture encoder", self.recipe.texture, self.folder.texture)

    def train_semantic(self) -> None:
        """Train the semantic encoder."""
        self._train_encoder("semantic encoder", self.recipe.semantic, self.folder.semantic)

    def _train_encoder(self, name: str, settings: EncoderSettings, folder: Path) -> None:
        if settings.train is None:
            return
        train, module = settings.train, registry.find("sfd.encoders", settings.name, "encoder")

        def work() -> None:
            with randomness.seeded(self.recipe.seed, name):
                encoder = module.build(parse(module.Config, settings.config))
            objective = parse(module.Objective, settings.objective)
            task = module.task(encoder, self.images[0], objective, seed=self.recipe.seed, batch_size=train.batch_size)
            task.finish(fit(task, train, folder, device=self.device)).save(folder)

        made_from = {
            "seed": self.recipe.seed,
            "data": self._data(),
            "encoder": settings.model_dump(exclude={"train"}),
            "train": _lasting(train),
        }
        stages.carry_out(name, folder, made_from, work, self.device, {"steps": train.steps})

    @cached_property
    def texture(self) -> TextureEncoder:
        """The trained texture encoder."""
        folder = _trained(self.recipe.texture, self.folder.texture, "sfd train-texture")
        return load_texture_encoder(folder).to(self.device)

    @cached_property
    def semantic(self) -> SemanticEncoder:
        """The trained semantic encoder."""
        folder = _trained(self.recipe.semantic, self.folder.semantic, "sfd train-semantic")
        return load_semantic_encoder(folder).to(self.device)

    def train_compressor(self) -> None:
        """Train the SemVAE, or fit PCA, on the semantic encoder's features."""
        if "semantic" not in self.recipe.streams:
            return
        settings = self.recipe.compressor
        made_from = {
            "seed": self.recipe.seed,
            "data": self._data(),
            "encoder": self.semantic.identity,
            "compressor": settings.model_dump(exclude={"train"}),
            "train": _lasting(settings.train) if settings.train else None,
        }
        name, work = (
            ("SemVAE", self._train_semvae) if settings.name == "semvae" else ("principal components", self._fit_pca)
        )
        extent = {"steps": settings.train.steps} if settings.train else {}
        stages.carry_out(name, self.folder.compressor, made_from, work, self.device, extent)

    def _train_semvae(self) -> None:
        settings, train = self.recipe.compressor, cast(TrainSettings, self.recipe.compressor.train)
        with randomness.seeded(self.recipe.seed, "SemVAE"):
            semvae = SemVAE(settings.semvae(self.semantic.channels))
        task = SemVAETask(
            semvae,
            self.semantic,
            self.images[0],
            settings.objective,
            seed=self.recipe.seed,
            batch_size=train.batch_size,
        )
        cast(SemVAE, fit(task, train, self.folder.compressor, device=self.device)).save(self.folder.compressor)

    def _fit_pca(self) -> None:
        settings, source = self.recipe.compressor, self.images[0]
        chosen = randomness.generator(self.recipe.seed, "pca").permutation(len(source))[: settings.fit_images]
        size = self.recipe.latents.batch_size
        batches = (
            self.semantic.encode(to_tensor(source.load(chosen[i : i + size])).to(self.device))
            for i in range(0, len(chosen), size)
        )
        fit_pca(batches, settings.pca(self.semantic.channels)).save(self.folder.compressor)

    @cached_property
    def compressor(self) -> Compressor:
        """The trained compressor."""
        if not (self.folder.compressor / stages.RECORD).exists():
            raise SFDError(f"{self.folder.compressor} holds no trained compressor; run `sfd train-semvae` first")
        return load_compressor(self.folder.compressor).to(self.device)

    def prepare(self) -> None:
        """Encode the training images into latent shards."""
        tokenizers = {"texture": self.texture.identity}
        if "semantic" in self.recipe.streams:
            tokenizers["semantic"] = f"{self.semantic.identity}+{self.compressor.identity}"
        tokenizers[FEATURES] = self.semantic.identity
        made_from = {
            "data": self._data(),
            "tokenizers": tokenizers,
            "latents": self.recipe.latents.model_dump(exclude={"batch_size", "workers"}),
        }

        def work() -> None:
            settings = self.recipe.latents
            prepare(self.images[0], self._encode, tokenizers, self.folder.latents, settings, device=self.device)

        stages.carry_out("latents", self.folder.latents, made_from, work, self.device)

    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        features = self.semantic.encode(images)
        latents = {"texture": self.texture.encode(images)}
        if "semantic" in self.recipe.streams:
            latents["semantic"] = self.compressor.encode(features)
        return latents | {FEATURES: features}

    def train(self) -> None:
        """Train the transformer and write the model directory."""
        if not (self.folder.latents / stages.RECORD).exists():
            raise SFDError(f"{self.folder.latents} holds no latents; run `sfd prepare` first")
        recipe = self.recipe
        made_from = {
            "seed": recipe.seed,
            "latents": files.checksum(self.folder.latents / MANIFEST),
            **recipe.model_dump(include={"streams", "schedule", "transformer", "loss"}),
            "train": _lasting(recipe.train),
        }
        stages.carry_out(
            "transformer", self.folder.training, made_from, self._train, self.device, {"steps": recipe.train.steps}
        )

    def _train(self) -> None:
        recipe = self.recipe
        latents = LatentSet(self.folder.latents)
        expected = self.texture.identity
        made_by = latents.manifest.streams["texture"].tokenizer
        if made_by != expected:
            raise SFDError(
                f"the latents in {self.folder.latents} were made by texture tokenizer {made_by}, but the run's is "
                f"{expected}; remove that folder and run `sfd prepare` again"
            )
        config = transformer_config(recipe, latents)
        schedule = build_schedule(recipe.schedule, config.composite.names)
        network = Transformer(config, seed=recipe.seed)
        task = DiffusionTask(
            network,
            latents,
            schedule,
            recipe.loss,
            seed=recipe.seed,
            batch_size=recipe.train.batch_size,
            previewer=lambda step, net, folder: self._preview(step, net, schedule, latents.manifest.classes, folder),
        )
        trained = fit(task, recipe.train, self.folder.training, device=self.device)
        history = {
            "recipe": recipe.name,
            "data": latents.manifest.data,
            "steps": recipe.train.steps,
            "batch_size": recipe.train.batch_size,
            "parameters": parameter_count(config),
        }
        generator = _without_projector(cast(Transformer, trained))
        Model(generator, schedule, self.texture, latents.manifest.classes, history).save(self.folder.model)

    def _preview(
        self, step: int, network: nn.Module, schedule: Schedule, classes: tuple[str, ...], folder: Path
    ) -> None:
        from sfd.evaluation.figures import image_grid

        model = Model(cast(Transformer, network), schedule, self.texture, classes)
        labels = [i % max(1, len(classes)) for i in range(PREVIEW_IMAGES)]
        settings = self.sample_settings(model).model_copy(update={"batch_size": PREVIEW_IMAGES})
        images = np.concatenate([g.images for g in generate(model, labels, range(PREVIEW_IMAGES), settings)])
        with files.written(folder / f"step-{step:09d}.png") as partial:
            image_grid(images, columns=max(1, min(len(classes), 10))).save(partial, "PNG")

    def sample_settings(self, model: Model) -> SampleSettings:
        """The recipe's way of sampling; without guidance where the images turned out to have no classes."""
        return self.recipe.sample if model.classes else without_guidance(self.recipe.sample)

    @cached_property
    def model(self) -> Model:
        """The trained model."""
        return load_model(self.folder.model, self.device)

    def train_evaluator(self) -> None:
        """Train the classifier that judges the samples, on images that nothing else in the run sees."""
        settings = self.recipe.evaluation.classifier
        made_from: dict[str, Any] = {"data": self._data(), "classifier": settings.model_dump(exclude={"training"})}
        made_from["training"] = _lasting(settings.training)

        def work() -> None:
            classifier.train(self.images[1], settings, self.folder.evaluator, device=self.device)

        extent = {"steps": settings.training.steps}
        stages.carry_out("evaluation classifier", self.folder.evaluator, made_from, work, self.device, extent)

    def _data(self) -> dict[str, Any]:
        return {**self.recipe.data.model_dump(exclude={"strict"}), "identity": self.images[0].identity}


def transformer_config(recipe: Recipe, latents: LatentSet) -> TransformerConfig:
    """Derive the network's architecture from the recipe and what the latents are."""
    weights = {name: s.weight for name, s in recipe.streams.items()}
    patch_sizes = {name: s.patch_size for name, s in recipe.streams.items()}
    composite = latents.composite(patch_sizes, weights)
    composite = Composite(streams=tuple(composite[name] for name in recipe.streams))
    features = latents.manifest.features
    return architecture(recipe, composite, len(latents.manifest.classes), features["channels"] if features else None)


def architecture(recipe: Recipe, composite: Composite, num_classes: int, features: int | None) -> TransformerConfig:
    """Join the recipe's network with the streams that it works on."""
    given = recipe.transformer
    size = SIZES[given.size]
    leading_first = tuple(reversed(composite.names))  # the published order: semantic, then texture
    repa = bool(recipe.loss.repa)
    return TransformerConfig(
        depth=given.depth or size.depth,
        width=given.width or size.width,
        heads=given.heads or size.heads,
        composite=composite,
        num_classes=num_classes,
        clocks=leading_first if given.clocks == "streams" else (),
        repa_block=given.repa_block if repa else None,
        repa_width=given.repa_width,
        repa_channels=features if repa else None,
        checkpointing=given.checkpointing,
    )


def _without_projector(network: Transformer) -> Transformer:
    """Leave the REPA projector behind: only training has a use for it."""
    fields = {"repa_block": None, "repa_channels": None, "checkpointing": False}
    plain = Transformer(network.config.model_copy(update=fields))
    kept = {name: t for name, t in network.state_dict().items() if not name.startswith("projector.")}
    plain.load_state_dict(kept)
    return plain.eval().requires_grad_(False)


def _trained(settings: EncoderSettings, folder: Path, command: str) -> Path:
    """Find a trained encoder: the one that the recipe names, or the one that this run made."""
    if settings.folder is not None:
        return Path(settings.folder)
    if not (folder / stages.RECORD).exists():
        raise SFDError(f"{folder} holds no trained encoder; run `{command}` first, or `sfd run` for all stages")
    return folder


def _lasting(settings: TrainSettings) -> Mapping[str, Any]:
    """Training settings that the result depends on, but for how long it goes on."""
    return settings.model_dump(exclude=set(FREE_TO_CHANGE))
