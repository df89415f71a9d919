"""A run from images to model and report, stage by stage; each stage can be made alone and is done once.

    images → texture encoder ┐
           → semantic encoder → compressor → latents → transformer → model → samples → metrics → report

Every stage writes into its own folder of the run and records what it is made from before its first step, so that the
same command resumes where it stopped and another recipe in the same folder is refused.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from sfd.generation.directory import model_folder
from sfd.generation.model import Model, load_model
from sfd.models.compressor import load_compressor
from sfd.run.assessment import EvaluatorStage, MetricsStage, SamplesStage
from sfd.run.encoders import CompressorStage, EncoderStage
from sfd.run.images import RunImages
from sfd.run.latents import LatentsStage
from sfd.run.learn_schedule import ProbeSettings, ProbeStage, check_streams, learn_schedule
from sfd.run.recipe import Recipe
from sfd.run.report import write_run_report
from sfd.run.stages import Run, RunFolder, Stage
from sfd.run.transformer import TransformerStage
from sfd.run.validate import check_machine, check_models
from sfd.utils import distributed


class Pipeline:
    """The stages of one run."""

    def __init__(self, recipe: Recipe, root: Path, device: torch.device) -> None:
        self.recipe, self.folder, self.device = recipe, RunFolder(root), device
        self.run = run = Run(recipe, self.folder, device)
        self.images = RunImages(run)
        self.texture = EncoderStage(run, "texture", self.images)
        self.semantic = EncoderStage(run, "semantic", self.images)
        self.compressor = CompressorStage(run, self.images, self.semantic)
        self.latents = LatentsStage(run, self.images, self.texture, self.semantic, self.compressor)
        self.transformer = TransformerStage(run, self.latents, self.texture)
        self.evaluator = EvaluatorStage(run, self.images)
        self.samples = (
            SamplesStage(run, "guided", self.transformer, lambda: self.guiding_model),
            SamplesStage(run, "unguided", self.transformer),
        )

    def stages(self) -> list[Stage[Run]]:
        """List the stages that the recipe needs, in order, without loading anything."""
        metrics = MetricsStage(self.run, self.samples, self.evaluator, self.images)
        return [stage for stage in (*self._training, *self.samples, metrics) if stage.needed()]

    def check_recipe(self) -> None:
        """Refuse a recipe that differs from what any started stage was made with, before the first of them works."""
        for stage in self.stages():
            stage.check_recipe()
        for stage in self.stages():
            stage.check_extension(self.stages())

    def make_model(self) -> None:
        """Make every stage up to the model and its evaluation classifier."""
        distributed.decide(self._check_given)
        for stage in self._training:
            stage.make()

    def learn_schedule(self, settings: ProbeSettings, length: float, bend: float) -> Path | None:
        """Make every stage up to the latents, a probe, and from it a recipe with a learned schedule, on rank 0."""
        check_streams(self.recipe)
        probe = ProbeStage(self.run, self.latents, settings)
        probe.check_recipe()
        distributed.decide(self._check_given)
        for stage in (self.texture, self.semantic, self.compressor, self.latents, probe):
            stage.make()
        return learn_schedule(probe, length, bend) if distributed.is_main_process() else None

    def report(self) -> None:
        """Sample with and without guidance, measure both and real images, and write the report."""
        samples = [stage for stage in self.samples if stage.distinct()]
        for stage in samples:
            stage.make()
        metrics = MetricsStage(self.run, samples, self.evaluator, self.images)
        metrics.make()
        if distributed.is_main_process():
            measured, count = metrics.metrics(), len(self.latents.latents)
            write_run_report(self.run, samples, measured, self.images, count, self.evaluator, self.semantic)

    @property
    def model(self) -> Model:
        """The trained model."""
        return self.transformer.model

    @cached_property
    def guiding_model(self) -> Model | None:
        """The guiding model of AutoGuidance, if the recipe names one."""
        guiding = self.recipe.evaluation.guiding_model
        return load_model(model_folder(Path(guiding)), self.device) if guiding is not None else None

    @property
    def _training(self) -> tuple[Stage[Run], ...]:
        return self.texture, self.semantic, self.compressor, self.latents, self.transformer, self.evaluator

    def _check_given(self) -> None:
        """Load given components and check the machine, so that neither fails after hours."""
        recipe = self.recipe
        check_machine(recipe, self.device)
        if recipe.texture.train is None:
            _ = self.texture.encoder
        if recipe.encodes_semantics and recipe.semantic.train is None:
            _ = self.semantic.encoder
        if recipe.compresses_semantics and recipe.compressor.folder is not None:
            load_compressor(Path(recipe.compressor.folder))
        check_models(recipe)
