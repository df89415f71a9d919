"""The stages that make what encodes images: texture encoder, semantic encoder, compressor."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from sfd.data.images import to_tensor
from sfd.encoders import encoder_module, load_published, open_semantic, open_texture
from sfd.models.component import CONFIG_FILE, WEIGHTS_FILE
from sfd.models.compressor import Compressor, load_compressor
from sfd.models.pca import PCAConfig, fit_pca
from sfd.models.semvae import SemVAE, SemVAEConfig
from sfd.run.images import RunImages
from sfd.run.recipe import EncoderSettings
from sfd.run.stages import Run, Stage
from sfd.run.validate import given_compressor
from sfd.training.tasks import TASKS
from sfd.training.tasks.semvae import SemVAETask
from sfd.training.trainer import fit
from sfd.utils import distributed, rng
from sfd.utils.config import parse
from sfd.utils.device import full_float32


class EncoderStage(Stage[Run]):
    """Trains an encoder, or loads the one that the recipe gives."""

    def __init__(self, run: Run, kind: Literal["texture", "semantic"], images: RunImages) -> None:
        self.settings: EncoderSettings = getattr(run.recipe, kind)
        self.kind, self.images = kind, images
        folder, fields = getattr(run.folder, kind), ("seed", "data", kind)
        super().__init__(run, f"{kind} encoder", f"sfd train-{kind}", folder, fields, self.settings.train)

    def needed(self) -> bool:
        """Whether the run has no encoder of this kind yet."""
        return self.train is not None and (self.kind == "texture" or self.run.recipe.encodes_semantics)

    def inputs(self) -> dict[str, Any]:
        """The images."""
        return self.images.identity()

    def results(self) -> tuple[Path, ...]:
        """The encoder."""
        return self.folder / CONFIG_FILE, self.folder / WEIGHTS_FILE

    def work(self) -> None:
        """Train the encoder."""
        settings, train, seed = self.settings, self.settings.train, self.run.recipe.seed
        assert train is not None
        module, kind = encoder_module(settings.name), TASKS[settings.name]
        with rng.seeded(seed, self.name):
            encoder = module.build(parse(module.Config, settings.config))
        objective = parse(kind.Objective, settings.objective)
        task = kind(encoder, self.images.training, objective, seed=seed, batch_size=train.batch_size)
        trained = task.finish(fit(task, train, self.folder, device=self.run.device))
        if distributed.is_main_process():
            trained.save(self.folder)

    @cached_property
    def encoder(self) -> Any:
        """The encoder, published, from a folder, or trained by this run: `TextureEncoder` or `SemanticEncoder`."""
        settings, opened = self.settings, open_texture if self.kind == "texture" else open_semantic
        if settings.pretrained is not None:
            encoder: Any = load_published(settings.name, settings.pretrained, settings.config)
        elif settings.folder is not None:
            encoder = opened(Path(settings.folder))
        else:
            self.require()
            encoder = opened(self.folder)
        return encoder.to(self.run.device)


class CompressorStage(Stage[Run]):
    """Trains the SemVAE, or fits PCA, on the semantic encoder's features; or loads the one that the recipe gives."""

    def __init__(self, run: Run, images: RunImages, semantic: EncoderStage) -> None:
        self.settings, self.images, self.semantic, self.sources = run.recipe.compressor, images, semantic, (semantic,)
        self.together = self.settings.name == "semvae"
        name, fields = "SemVAE" if self.together else "principal components", ("seed", "data", "compressor")
        super().__init__(run, name, "sfd train-semvae", run.folder.compressor, fields, self.settings.train)

    def needed(self) -> bool:
        """Whether there is a semantic stream that is encoded by a compressor of this run."""
        recipe = self.run.recipe
        return recipe.compresses_semantics and self.settings.folder is None

    def inputs(self) -> dict[str, Any]:
        """The images, and the encoder of their features."""
        return self.images.identity() | {"semantic encoder": self.semantic.encoder.identity}

    def results(self) -> tuple[Path, ...]:
        """The compressor."""
        return self.folder / CONFIG_FILE, self.folder / WEIGHTS_FILE

    def work(self) -> None:
        """Train or fit the compressor."""
        if self.settings.name == "pca":
            self._fit_pca()
            return
        encoder, train, seed = self.semantic.encoder, self.settings.train, self.run.recipe.seed
        assert train is not None
        with rng.seeded(seed, "SemVAE"):
            semvae = SemVAE(cast(SemVAEConfig, self.settings.config(encoder.channels)))
        objective, images = self.settings.objective, self.images.training
        task = SemVAETask(semvae, encoder, images, objective, seed=seed, batch_size=train.batch_size)
        trained = fit(task, train, self.folder, device=self.run.device)
        if distributed.is_main_process():
            cast(SemVAE, trained).save(self.folder)

    @full_float32()
    def _fit_pca(self) -> None:
        encoder, images, size = self.semantic.encoder, self.images.training, self.run.recipe.latents.batch_size
        chosen = rng.generator(self.run.recipe.seed, "pca").permutation(len(images))[: self.settings.fit_images]
        batches = (
            encoder.encode(to_tensor(images.load(chosen[i : i + size])).to(self.run.device))
            for i in range(0, len(chosen), size)
        )
        fit_pca(batches, cast(PCAConfig, self.settings.config(encoder.channels))).save(self.folder)

    @cached_property
    def compressor(self) -> Compressor:
        """The compressor, from a folder or made by this run."""
        if self.settings.folder is not None:
            compressor = given_compressor(self.settings, self.semantic.encoder.channels)
        else:
            self.require()
            compressor = load_compressor(self.folder)
        return compressor.to(self.run.device)
