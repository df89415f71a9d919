"""The stage that trains the transformer and writes the model directory."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sfd.data.grid import image_grid
from sfd.data.shards import MANIFEST, LatentSet
from sfd.data.source import check_classes
from sfd.generation.directory import RECORD, model_config, model_folder, read_record
from sfd.generation.model import Model, load_model
from sfd.latents import CompositeLatent
from sfd.models.component import assemble
from sfd.models.dit import LightningDiT, parameter_count
from sfd.models.dit_config import DiTConfig
from sfd.models.warm_start import inherited, warm_start
from sfd.run.encoders import EncoderStage
from sfd.run.latents import LatentsStage, write_real_preview
from sfd.run.recipe import Recipe
from sfd.run.stages import Run, Stage
from sfd.run.validate import architecture
from sfd.schedule import Schedule, build_schedule
from sfd.training.checkpoint import weights_at
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.trainer import fit
from sfd.utils import distributed, files
from sfd.utils.progress import say

PREVIEW_IMAGES = 32


class TransformerStage(Stage[Run]):
    """Trains the transformer on latents; the texture encoder decodes what it samples."""

    def __init__(self, run: Run, latents: LatentsStage, texture: EncoderStage) -> None:
        self.latents, self.texture, self.sources = latents, texture, (latents,)
        fields = ("seed", "streams", "schedule", "transformer", "loss", "train")
        super().__init__(run, "transformer", "sfd train", run.folder.training, fields, run.recipe.train)

    def inputs(self) -> dict[str, Any]:
        """The latents, and the model whose weights training starts from."""
        self.latents.require()
        found = {"latents": files.checksum(self.latents.folder / MANIFEST)}
        if self.run.recipe.train.init is not None:
            found["identity of train.init"] = read_record(model_folder(self.run.recipe.train.init)).identity
        return found

    def results(self) -> tuple[Path, ...]:
        """The model directory."""
        return (self.run.folder.model / RECORD,)

    def work(self) -> None:
        """Build schedule, network and task from recipe and latents; train; write the model directory."""
        recipe, latents = self.run.recipe, self.latents.latents
        if distributed.is_main_process():
            self._show_latents(latents)
        config = transformer_config(recipe, latents)
        schedule = build_schedule(recipe.schedule, config.composite.names)
        network = LightningDiT(config, seed=recipe.seed)
        if recipe.train.init is not None:
            source = load_model(model_folder(Path(recipe.train.init)), torch.device("cpu"))
            fresh = warm_start(network, source.transformer, latents.manifest.classes, source.classes)
            total = len(network.state_dict())
            taken = total - sum(not name.startswith("class ") for name in fresh)
            say(f"starts from {recipe.train.init}: {taken} of {total} tensors; fresh: {', '.join(fresh) or 'nothing'}")
        size, preview = recipe.train.batch_size, partial(self._preview, schedule)
        task = DiffusionTask(
            network, latents, schedule, recipe.loss, seed=recipe.seed, batch_size=size, previewer=preview
        )
        trained = fit(task, recipe.train, self.folder, device=self.run.device)
        if distributed.is_main_process():
            model = self._model(cast(LightningDiT, trained), schedule, recipe.train.steps)
            if recipe.compresses_semantics:
                model.semantic, model.compressor = self.latents.semantic.encoder, self.latents.compressor.compressor
            model.save(self.run.folder.model)

    @cached_property
    def model(self) -> Model:
        """The trained model."""
        self.require()
        return load_model(self.run.folder.model, self.run.device)

    def model_at(self, step: int) -> Model:
        """The model of a kept checkpoint, with its averaged weights; without encoder and compressor of semantics."""
        weights = weights_at(self.folder / "checkpoints", step)
        config = transformer_config(self.run.recipe, self.latents.latents)
        network = assemble(lambda: LightningDiT(config), weights, f"the checkpoint of step {step} in {self.folder}")
        return self._model(network, build_schedule(self.run.recipe.schedule, config.composite.names), step)

    def _model(self, network: LightningDiT, schedule: Schedule, steps: int) -> Model:
        recipe, manifest = self.run.recipe, self.latents.latents.manifest
        history = {
            "recipe": recipe.name,
            "data": manifest.data,
            "steps": steps,
            "batch_size": recipe.train.batch_size,
            "parameters": parameter_count(network.config),
        }
        model = Model(_without_projector(network), schedule, self.texture.encoder, manifest.classes, history)
        model.sampling = recipe.sampling(manifest.classes)
        return model

    def _show_latents(self, latents: LatentSet) -> None:
        path = self.folder / "previews" / "real.png"
        write_real_preview(path, latents, self.texture.encoder, self.run.device)
        if self.run.recipe.latents.published is not None:
            say(f"check that these are images, not noise: {path}")

    def _preview(self, schedule: Schedule, step: int, network: nn.Module, folder: Path) -> None:
        classes, recipe = self.latents.latents.manifest.classes, self.run.recipe
        model = Model(cast(LightningDiT, network), schedule, self.texture.encoder, classes)
        labels = [i % max(1, len(classes)) for i in range(PREVIEW_IMAGES)]
        settings = recipe.sampling(classes).model_copy(update={"batch_size": PREVIEW_IMAGES, "compile": False})
        if settings.guidance_from == "guiding_model":
            settings = settings.unguided()
        (batch,) = model.sample_batches(labels, range(PREVIEW_IMAGES), settings)
        with files.atomic_write(folder / f"step-{step:09d}.png") as partial:
            image_grid(batch.images, columns=max(1, min(len(classes), 10))).save(partial, "PNG")


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
