"""Trains and measures one arm with one seed. All that is made is kept and shared by what it is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.probe import probed
from benchmarks.study.arms import Arm, Base
from sfd.data.images import to_tensor, to_uint8
from sfd.data.shards import LatentSet
from sfd.evaluation.evaluate import evaluate
from sfd.evaluation.reference import Reference
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.models.dit import LightningDiT
from sfd.run.learn_schedule import ProbeSettings
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import Recipe, load_recipe
from sfd.run.stages import Stage
from sfd.run.transformer import transformer_config
from sfd.schedule import build_schedule
from sfd.training.checkpoint import weights_at
from sfd.training.tasks.diffusion import DiffusionTask
from sfd.training.trainer import fit
from sfd.utils.errors import SFDError

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)  # of guidance by the null class
WEAK = (2.0, 3.0)  # scales of AutoGuidance, by the arm's own network at the first checkpoint that is kept
FEW = (5, 10)  # steps of further unguided samples
FROM_WEAK = {"guidance_from": "guiding_model"}
LENGTH, BEND = 0.1, 0.01  # of a learned schedule's path, as in `sfd learn-schedule`
OF_LATENTS = ("data", "texture", "semantic", "compressor", "latents")  # fields of a recipe that latents depend on
SHARED = Arm("base", ())  # what all arms have in common
SHOWN = ("frechet_distance", "class_accuracy", "precision", "recall")  # metrics that tables show
REAL = ("real-images", "decoded-real-images")
PER_SEED = 1_000_000  # images of a training seed have noise of their own, the same for all arms


class Study:
    """The arms of one data set, in a folder."""

    def __init__(self, base: Base, changes: Sequence[str], folder: Path, device: torch.device) -> None:
        self.base, self.folder, self.device = base, folder, device
        self.changes = (*base.changes, *changes)
        train = self.recipe(SHARED).train
        if train.keep_every is None or train.keep_every >= train.steps:
            raise SFDError(
                f"train.keep_every is {train.keep_every}; AutoGuidance takes the first checkpoint that is kept, so set "
                f"it below train.steps ({train.steps})"
            )

    def measure(self, arm: Arm, seed: int) -> bool:
        """Train an arm and measure its samples, unless all is there; whether there was something to do."""
        wanted: dict[Path, dict[str, Any]] = {
            **{self.path(arm, seed, f"guidance-{scale:g}"): {"guidance": scale} for scale in SCALES},
            **{self.path(arm, seed, f"in-{steps}-steps"): {"steps": steps} for steps in FEW},
            **{self.path(arm, seed, f"weak-{scale:g}"): {"guidance": scale} | FROM_WEAK for scale in WEAK},
        }
        missing = {path: sampling for path, sampling in wanted.items() if not path.exists()}
        if missing:
            model = self.train(arm, seed)
            for path, sampling in missing.items():
                guiding = self.early(model, arm, seed) if "guidance_from" in sampling else None
                self._sample_and_evaluate(model, seed, path, sampling, guiding)
        return bool(missing)

    def measure_real(self) -> None:
        """Measure as many training images as samples, as they are and decoded from latents: they bound all arms."""
        paths = [self.folder / "results" / f"{name}.json" for name in REAL]
        if all(path.exists() for path in paths):
            return
        parts = self.parts(SHARED)
        images, codec = parts.images.training, parts.texture.encoder.to(self.device)
        count = self.recipe(SHARED).evaluation.samples_per_class * len(images.classes)
        chosen = np.linspace(0, len(images) - 1, count).astype(int)
        labels, seen = [images.labels[k] for k in chosen], images.load(chosen)
        batches = [to_tensor(part).to(self.device) for part in np.array_split(seen, -(-count // 250))]
        with torch.no_grad():
            decoded = np.concatenate([to_uint8(codec.decode(codec.encode(batch))) for batch in batches])
        for path, real in zip(paths, (seen, decoded), strict=True):
            evaluate(real, labels, self.reference, name=path.stem, real=True).write(path)

    def path(self, arm: Arm, seed: int, what: str) -> Path:
        """The file of one set of metrics."""
        return self.folder / "results" / f"{arm.name}.seed-{seed}.{what}.json"

    def _training(self, arm: Arm, seed: int) -> Path:
        return self.folder / "training" / f"{arm.name}.seed-{seed}"

    def recipe(self, arm: Arm) -> Recipe:
        """The complete recipe of an arm."""
        return load_recipe(self.base.recipe, [*self.changes, *arm.changes])

    def train(self, arm: Arm, seed: int) -> Model:
        """Train an arm, or read what was trained."""
        recipe, parts = self.recipe(arm), self.parts(arm)
        latents, texture = LatentSet(parts.folder.latents), parts.texture.encoder
        config = transformer_config(recipe, latents)
        schedule = build_schedule(self._learned(parts) if arm.learned else recipe.schedule, config.composite.names)

        def preview(step: int, network: nn.Module, _: Path) -> None:
            path = self.path(arm, seed, f"step-{step}")
            if step < recipe.train.steps and not path.exists():
                self._sample_and_evaluate(Model(network, schedule, texture, latents.manifest.classes), seed, path, {})

        network, size = LightningDiT(config, seed=seed), recipe.train.batch_size
        task = DiffusionTask(network, latents, schedule, recipe.loss, seed=seed, batch_size=size, previewer=preview)
        trained = fit(task, recipe.train, self._training(arm, seed), device=self.device)
        return Model(trained, schedule, texture, latents.manifest.classes)

    def _learned(self, parts: Pipeline) -> dict[str, Any]:
        """The schedule that a probe finds; `parts` keeps both."""
        path = parts.learn_schedule(ProbeSettings(), LENGTH, BEND)
        assert path is not None  # on rank 0
        return load_recipe(path).schedule

    def early(self, model: Model, arm: Arm, seed: int) -> Model:
        """The arm's network early in its training."""
        step = self.recipe(arm).train.keep_every
        assert step is not None
        network = LightningDiT(model.transformer.config)
        network.load_state_dict(weights_at(self._training(arm, seed) / "checkpoints", step))
        return replace(model, transformer=network.to(self.device).eval())

    def sampling(self, model: Model, seed: int, changes: dict[str, Any]) -> tuple[list[int], range, SamplingConfig]:
        """Labels, seeds and settings of an arm's samples."""
        recipe = self.recipe(SHARED)
        settings = recipe.sample.model_copy(update={"guidance": 1.0, "guidance_from": "null_class", **changes})
        labels = [c for c in range(len(model.classes)) for _ in range(recipe.evaluation.samples_per_class)]
        return labels, range(PER_SEED * seed, PER_SEED * seed + len(labels)), settings

    def _sample_and_evaluate(
        self, model: Model, seed: int, path: Path, changes: dict[str, Any], guiding: Model | None = None
    ) -> None:
        labels, seeds, settings = self.sampling(model, seed, changes)
        images = np.concatenate([b.images for b in model.sample_batches(labels, seeds, settings, guiding=guiding)])
        used = settings.model_dump(mode="json")
        evaluate(images, labels, self.reference, name=path.name, sampling=used).write(path)

    @cached_property
    def reference(self) -> Reference:
        """Held-out images as the judge sees them: the run's classifier, or a linear one of an extractor's features."""
        recipe = self.recipe(SHARED)
        fixed = recipe.fixed()
        run = Pipeline(recipe, self._part("judge", [fixed["data"], fixed["evaluation"]["classifier"]]), self.device)
        if self.base.extractor is None:
            run.evaluator.make()
            return run.evaluator.reference()
        settings, cache = recipe.evaluation.classifier, run.folder.root / "features"
        assert settings is not None
        return probed(self.base.extractor, run.images.held_out, settings, cache, self.device)

    def parts(self, arm: Arm) -> Pipeline:
        """Encoders and latents for an arm; those of equal recipes are one."""
        own = [change for change in arm.changes if change.split(".")[0].split("=")[0] in OF_LATENTS]
        recipe = load_recipe(self.base.recipe, [*self.changes, *own])
        fixed, given = recipe.fixed(), []
        for kind in ("texture", "semantic"):
            settings = getattr(recipe, kind)
            if settings.train is not None:
                encoders = Pipeline(recipe, self._part(kind, [recipe.seed, fixed["data"], fixed[kind]]), self.device)
                stage: Stage = getattr(encoders, kind)
                stage.make()
                given.append(f"{kind}={{name: {settings.name}, folder: '{stage.folder}'}}")
        folder = self._part("latents", [recipe.seed, *(fixed[field] for field in OF_LATENTS)])
        parts = Pipeline(load_recipe(self.base.recipe, [*self.changes, *own, *given]), folder, self.device)
        parts.compressor.make()
        parts.latents.make()
        return parts

    def _part(self, kind: str, made_from: list[object]) -> Path:
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
        return self.folder / "parts" / f"{kind}-{digest}"
