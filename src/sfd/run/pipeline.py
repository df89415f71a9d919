"""A run from images to model, stage by stage; each stage can be called alone and is done once.

    images → texture encoder ┐
           → semantic encoder → compressor → latents → transformer → model

Every stage writes into its own folder of the run and records what it is made from before its first step, so that the
same command resumes where it stopped and another recipe in the same folder is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sfd.data.cache import cached
from sfd.data.encode import LatentWriter
from sfd.data.folder import skipped_report
from sfd.data.grid import image_grid
from sfd.data.images import ImageSource, to_tensor
from sfd.data.published import PublishedLatents
from sfd.data.shards import MANIFEST, LatentSet, read_manifest
from sfd.data.source import check_classes, open_source
from sfd.data.split import split
from sfd.encoders import SemanticEncoder, TextureEncoder, open_semantic, open_texture
from sfd.evaluation.extractors.classifier import ClassifierExtractor, check_data, load_classifier
from sfd.generation.config import SamplingConfig
from sfd.generation.directory import RECORD, model_config, model_folder, read_record
from sfd.generation.model import Model, load_model
from sfd.latents import CompositeLatent
from sfd.models.component import CONFIG_FILE, WEIGHTS_FILE, Component
from sfd.models.compressor import Compressor, load_compressor
from sfd.models.dit import DiTConfig, LightningDiT, parameter_count
from sfd.models.pca import fit_pca
from sfd.models.semvae import SemVAE
from sfd.models.warm_start import inherited, warm_start
from sfd.run import stages
from sfd.run.latents import open_latents, write_real_preview
from sfd.run.recipe import EncoderSettings, Recipe, dump_recipe
from sfd.run.stages import Stage, pick
from sfd.run.validate import architecture, check_machine, given_compressor, planned_shapes
from sfd.schedule import Schedule, build_schedule
from sfd.training.config import TrainSettings
from sfd.training.tasks import TASKS
from sfd.training.tasks.classifier import ClassifierSettings, train_classifier
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.tasks.semvae import SemVAETask
from sfd.training.trainer import fit
from sfd.utils import distributed, files, registry, rng
from sfd.utils.config import parse
from sfd.utils.device import full_float32
from sfd.utils.errors import SFDError
from sfd.utils.progress import say

PREVIEW_IMAGES = 32
ENCODERS = "sfd.encoders"


class Pipeline:
    """The stages of one run."""

    def __init__(self, recipe: Recipe, root: Path, device: torch.device) -> None:
        self.recipe, self.folder, self.device = recipe, stages.RunFolder(root), device
        self.fixed = recipe.fixed()

    def all(self) -> None:
        """Do every stage up to the model and its evaluator, if there is one."""
        self._check_given()
        self.train_texture()
        if self.recipe.encodes_semantics:
            self.train_semantic()
            self.train_compressor()
        self.prepare()
        self.train()
        if self.recipe.evaluation.classifier is not None:
            self.train_evaluator()

    def _check_given(self) -> None:
        """Load pre-trained components and check the machine, so that neither fails after hours."""
        check_machine(self.recipe, self.device)
        if self.recipe.texture.pretrained is not None:
            _ = self.texture
        if self.recipe.encodes_semantics:
            if self.recipe.semantic.pretrained is not None:
                _ = self.semantic
            if self.recipe.compressor.folder is not None:
                load_compressor(Path(self.recipe.compressor.folder))
        if self.recipe.evaluation.weak is not None:
            weak = model_folder(Path(self.recipe.evaluation.weak))
            files.read_json(weak / RECORD, "model directory (evaluation.weak)")

    def save_recipe(self) -> None:
        """Write the resolved recipe of the last accepted command."""
        files.write_text(self.folder.recipe, dump_recipe(self.recipe), shared=True)

    def stages(self) -> list[Stage]:
        """List the recipe's stages up to the model and its evaluator, without loading anything."""
        recipe, listed = self.recipe, []
        if recipe.texture.train is not None:
            listed.append(self._texture_stage())
        if recipe.encodes_semantics and recipe.semantic.train is not None:
            listed.append(self._semantic_stage())
        if recipe.latents.published is None and self._makes_compressor:
            listed.append(self._compressor_stage())
        listed += [self.latents_stage, self._transformer_stage()]
        if recipe.evaluation.classifier is not None:
            listed.append(self._evaluator_stage())
        return listed

    def carry_out(self, stage: Stage, work: Callable[[], object], *, together: bool = False) -> None:
        """Do a stage's work, unless it is done; see `Stage.run`."""
        stage.run(work, self.device, self.save_recipe, together=together)

    @cached_property
    def images(self) -> tuple[ImageSource, ImageSource]:
        """The images to train on and those held out, in memory where they fit."""
        opened = open_source(self.recipe.data, self.folder.checked)
        training, held_out = split(cached(opened), self.recipe.data.holdout, self.recipe.data.seed)
        if self.recipe.evaluation.classifier is not None:
            check_data(held_out, self.recipe.evaluation.classifier)
        skipped = skipped_report(opened)
        if skipped:
            files.write_text(self.folder.skipped, skipped, shared=True)
        else:
            self.folder.skipped.unlink(missing_ok=True)
        return training, held_out

    def train_texture(self) -> None:
        """Train the texture encoder."""
        self._train_encoder(self.recipe.texture, self._texture_stage())

    def train_semantic(self) -> None:
        """Train the semantic encoder."""
        self._train_encoder(self.recipe.semantic, self._semantic_stage())

    def _texture_stage(self) -> Stage:
        return self._encoder_stage("texture", self.recipe.texture, self.folder.texture)

    def _semantic_stage(self) -> Stage:
        return self._encoder_stage("semantic", self.recipe.semantic, self.folder.semantic)

    def _encoder_stage(self, kind: str, settings: EncoderSettings, folder: Path) -> Stage:
        fields = pick(self.fixed, "seed", "data", kind)
        name, command, results = f"{kind} encoder", f"sfd train-{kind}", _part_files(folder)
        return Stage(name, command, folder, fields, self.data_identity, settings.train, results)

    def _train_encoder(self, settings: EncoderSettings, stage: Stage) -> None:
        if settings.train is None:
            return
        train, module = settings.train, registry.find(ENCODERS, settings.name, "encoder")

        def work() -> None:
            with rng.seeded(self.recipe.seed, stage.name):
                encoder = module.build(parse(module.Config, settings.config))
            kind: Any = TASKS[settings.name]
            objective = parse(kind.Objective, settings.objective)
            task = kind(encoder, self.images[0], objective, seed=self.recipe.seed, batch_size=train.batch_size)
            trained = task.finish(fit(task, train, stage.folder, device=self.device))
            if distributed.is_main_process():
                trained.save(stage.folder)

        self.carry_out(stage, work, together=True)

    @cached_property
    def texture(self) -> TextureEncoder:
        """The texture encoder that the recipe names or that this run trained."""
        settings = self.recipe.texture
        encoder = _published(settings) or open_texture(_trained(settings, self._texture_stage))
        return cast(TextureEncoder, encoder.to(self.device))

    @cached_property
    def semantic(self) -> SemanticEncoder:
        """The semantic encoder that the recipe names or that this run trained."""
        settings = self.recipe.semantic
        encoder = _published(settings) or open_semantic(_trained(settings, self._semantic_stage))
        return cast(SemanticEncoder, encoder.to(self.device))

    def _compressor_stage(self) -> Stage:
        settings, folder = self.recipe.compressor, self.folder.compressor

        def inputs() -> dict[str, Any]:
            return self.data_identity() | {"semantic encoder": self.semantic.identity}

        fields = pick(self.fixed, "seed", "data", "compressor")
        name = "SemVAE" if settings.name == "semvae" else "principal components"
        return Stage(name, "sfd train-semvae", folder, fields, inputs, settings.train, _part_files(folder))

    @property
    def _makes_compressor(self) -> bool:
        return "semantic" in self.recipe.streams and self.recipe.compressor.folder is None

    def train_compressor(self) -> None:
        """Train the SemVAE, or fit PCA, on the semantic encoder's features."""
        if self._makes_compressor:
            training = self.recipe.compressor.name == "semvae"
            work = self._train_semvae if training else self._fit_pca
            self.carry_out(self._compressor_stage(), work, together=training)

    def _train_semvae(self) -> None:
        settings, train = self.recipe.compressor, cast(TrainSettings, self.recipe.compressor.train)
        with rng.seeded(self.recipe.seed, "SemVAE"):
            semvae = SemVAE(settings.semvae(self.semantic.channels))
        task = SemVAETask(
            semvae,
            self.semantic,
            self.images[0],
            settings.objective,
            seed=self.recipe.seed,
            batch_size=train.batch_size,
        )
        trained = cast(SemVAE, fit(task, train, self.folder.compressor, device=self.device))
        if distributed.is_main_process():
            trained.save(self.folder.compressor)

    @full_float32()
    def _fit_pca(self) -> None:
        settings, source = self.recipe.compressor, self.images[0]
        chosen = rng.generator(self.recipe.seed, "pca").permutation(len(source))[: settings.fit_images]
        size = self.recipe.latents.batch_size
        batches = (
            self.semantic.encode(to_tensor(source.load(chosen[i : i + size])).to(self.device))
            for i in range(0, len(chosen), size)
        )
        fit_pca(batches, settings.pca(self.semantic.channels)).save(self.folder.compressor)

    @cached_property
    def compressor(self) -> Compressor:
        """The compressor that the recipe names or that this run trained."""
        if self.recipe.compressor.folder is not None:
            return given_compressor(self.recipe.compressor, self.semantic.channels).to(self.device)
        self._compressor_stage().require()
        return load_compressor(self.folder.compressor).to(self.device)

    @cached_property
    def _latent_source(self) -> LatentWriter | PublishedLatents:
        """Source of the latents: the run's encoders, or published shards."""
        recipe, folder = self.recipe, self.folder.latents
        if recipe.latents.published is not None:
            return PublishedLatents(Path(recipe.latents.published), self.texture, recipe.data.classes, folder)
        texture = self.texture
        semantic = self.semantic if recipe.encodes_semantics else None
        compressor = self.compressor if "semantic" in recipe.streams else None
        return LatentWriter(self.images[0], texture, semantic, compressor, folder, recipe.latents, self.device)

    @property
    def latents_stage(self) -> Stage:
        """The stage that encodes latents, or checks published ones."""
        folder, manifest = self.folder.latents, self.folder.latents / MANIFEST
        results = [manifest]
        fields: dict[str, Any] = {"published latents": self.recipe.latents.published is not None}
        if self.recipe.latents.published is None:
            fields |= pick(self.fixed, "data", "latents")
            results += [folder / shard.file for shard in read_manifest(folder).shards] if manifest.exists() else []
        return Stage(
            "latents", "sfd prepare", folder, fields, lambda: self._latent_source.inputs(), results=tuple(results)
        )

    def prepare(self) -> None:
        """Encode the training images into latent shards, or check published ones."""
        if self.recipe.latents.published is not None:
            planned_shapes(self.recipe)  # refuses what does not fit the recipe
        together = self.recipe.latents.published is None
        self.latents_stage.run(lambda: self._latent_source.write(), self.device, self.save_recipe, together=together)

    @cached_property
    def latents(self) -> LatentSet:
        """The latents to train on."""
        self.latents_stage.require()
        return open_latents(self.recipe, self.folder)

    def _transformer_stage(self) -> Stage:
        def inputs() -> dict[str, Any]:
            self.latents_stage.require()
            found = {"latents": files.checksum(self.folder.latents / MANIFEST)}
            if self.recipe.train.init is not None:
                found["identity of train.init"] = read_record(model_folder(self.recipe.train.init)).identity
            return found

        fields = pick(self.fixed, "seed", "streams", "schedule", "transformer", "loss", "train")
        results = (self.folder.model / RECORD,)
        return Stage("transformer", "sfd train", self.folder.training, fields, inputs, self.recipe.train, results)

    def train(self) -> None:
        """Train the transformer and write the model directory."""
        self._transformer_stage().run(self._train, self.device, self.save_recipe, together=True)

    def _train(self) -> None:
        recipe, latents = self.recipe, self.latents
        if distributed.is_main_process():
            preview = self.folder.training / "previews" / "real.png"
            write_real_preview(preview, latents, self.texture, self.device)
            if recipe.latents.published is not None:
                say(f"check that these are images, not noise: {preview}")
        config = transformer_config(recipe, latents)
        schedule = build_schedule(recipe.schedule, config.composite.names)
        network = LightningDiT(config, seed=recipe.seed)
        if recipe.train.init is not None:
            source = load_model(model_folder(Path(recipe.train.init)), torch.device("cpu"))
            fresh = warm_start(network, source.transformer, latents.manifest.classes, source.classes)
            say(f"starts from {recipe.train.init}; fresh: {', '.join(fresh) or 'nothing'}")
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
        if not distributed.is_main_process():
            return
        history = {
            "recipe": recipe.name,
            "data": latents.manifest.data,
            "steps": recipe.train.steps,
            "batch_size": recipe.train.batch_size,
            "parameters": parameter_count(config),
        }
        generator = _without_projector(cast(LightningDiT, trained))
        model = Model(generator, schedule, self.texture, latents.manifest.classes, history)
        model.sampling = self.sample_settings(model)
        model.save(self.folder.model)

    def _preview(
        self, step: int, network: nn.Module, schedule: Schedule, classes: tuple[str, ...], folder: Path
    ) -> None:
        model = Model(cast(LightningDiT, network), schedule, self.texture, classes)
        labels = [i % max(1, len(classes)) for i in range(PREVIEW_IMAGES)]
        settings = self.sample_settings(model).model_copy(update={"batch_size": PREVIEW_IMAGES, "compile": False})
        if settings.guidance_from == "weak_model":
            settings = settings.unguided()
        (batch,) = model.sample_batches(labels, range(PREVIEW_IMAGES), settings)
        with files.atomic_write(folder / f"step-{step:09d}.png") as partial:
            image_grid(batch.images, columns=max(1, min(len(classes), 10))).save(partial, "PNG")

    def sample_settings(self, model: Model) -> SamplingConfig:
        """The recipe's sampling settings, without guidance by the null class if there are no classes."""
        sample = self.recipe.sample
        able = bool(model.classes) or sample.guidance_from != "null_class"
        return sample if sample.guides and able else sample.unguided()

    @cached_property
    def model(self) -> Model:
        """The trained model."""
        self._transformer_stage().require()
        return load_model(self.folder.model, self.device)

    @cached_property
    def weak(self) -> Model | None:
        """The guiding model of AutoGuidance, if the recipe names one."""
        weak = self.recipe.evaluation.weak
        return load_model(model_folder(Path(weak)), self.device) if weak is not None else None

    @property
    def classifier_settings(self) -> ClassifierSettings:
        """Settings of the evaluation classifier."""
        settings = self.recipe.evaluation.classifier
        if settings is None:
            raise SFDError(
                f"recipe {self.recipe.name!r} has no evaluation.classifier; "
                "measure its samples with `sfd evaluate SAMPLES --reference …`, or set evaluation.classifier={}"
            )
        return settings

    def _evaluator_stage(self) -> Stage:
        settings, folder = self.classifier_settings, self.folder.evaluator
        fields = pick(self.fixed, "data", "evaluation.classifier")
        results = (folder / "extractor" / CONFIG_FILE,)
        name, command = "evaluation classifier", "sfd train-evaluator"
        return Stage(name, command, folder, fields, self.data_identity, settings.training, results)

    def train_evaluator(self) -> None:
        """Train the evaluation classifier, on images that nothing else in the run sees."""
        stage, settings = self._evaluator_stage(), self.classifier_settings

        def work() -> None:
            network = train_classifier(self.images[1], settings, stage.folder, device=self.device)
            if distributed.is_main_process():
                network.save(stage.folder / "extractor")

        self.carry_out(stage, work, together=True)

    @cached_property
    def evaluator(self) -> ClassifierExtractor:
        """The evaluation classifier."""
        self._evaluator_stage().require()
        return load_classifier(self.folder.evaluator / "extractor", self.device)

    def data_identity(self) -> dict[str, Any]:
        """Identity of the images, independent of where they are stored."""
        return {"identity of the images in data.source": self.images[0].identity}


def transformer_config(recipe: Recipe, latents: LatentSet) -> DiTConfig:
    """Derive the network's architecture from the recipe and the latents."""
    weights = {name: s.weight for name, s in recipe.streams.items()}
    patch_sizes = {name: s.patch_size for name, s in recipe.streams.items()}
    composite = latents.composite(patch_sizes, weights)
    composite = CompositeLatent(streams=tuple(composite[name] for name in recipe.streams))
    if recipe.train.init is not None:
        composite = inherited(composite, model_config(recipe.train.init).composite)
    check_classes(recipe.data, len(latents.manifest.classes), str(latents.folder))
    features = latents.manifest.features
    return architecture(recipe, composite, len(latents.manifest.classes), features["channels"] if features else None)


def _without_projector(network: LightningDiT) -> LightningDiT:
    """Remove the REPA projector, which only training uses."""
    fields = {"repa_block": None, "repa_channels": None, "checkpointing": False}
    plain = LightningDiT(network.config.model_copy(update=fields))
    kept = {name: t for name, t in network.state_dict().items() if not name.startswith("projector.")}
    plain.load_state_dict(kept)
    return plain.eval().requires_grad_(False)


def _published(settings: EncoderSettings) -> Component | None:
    """Load a published encoder, if the recipe names one."""
    if settings.pretrained is None:
        return None
    module = registry.find(ENCODERS, settings.name, "encoder")
    return cast(Component, module.pretrained(settings.pretrained, settings.config))


def _trained(settings: EncoderSettings, make_stage: Callable[[], Stage]) -> Path:
    """Folder of a trained encoder that the recipe names or that this run trained."""
    if settings.folder is not None:
        return Path(settings.folder)
    stage = make_stage()
    stage.require()
    return stage.folder


def _part_files(folder: Path) -> tuple[Path, ...]:
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE
