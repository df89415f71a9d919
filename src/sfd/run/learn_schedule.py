"""Find a schedule before a run's transformer is trained: a short probe, its errors at all pairs of times, a path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd.data.shards import MANIFEST
from sfd.evaluation import figures
from sfd.models.dit import LightningDiT
from sfd.run.latents import LatentsStage
from sfd.run.recipe import Recipe, dump_recipe
from sfd.run.stages import Run, Stage
from sfd.run.transformer import transformer_config
from sfd.schedule import Schedule, build_schedule
from sfd.training.config import TrainSettings
from sfd.training.schedule_path import as_schedule, loss_along, measure_errors, shortest_path
from sfd.training.tasks.diffusion import DiffusionTask, LossSettings
from sfd.training.tasks.joint_schedule import JointModel, JointTask
from sfd.training.trainer import fit
from sfd.utils import distributed, files
from sfd.utils.config import Settings, parse
from sfd.utils.device import full_float32, to_device
from sfd.utils.errors import SFDError
from sfd.utils.progress import say

ERRORS, INCREMENTS, RECIPE, MAP = "errors.json", "increments.json", "learned.yaml", "map.png"


class ProbeSettings(Settings):
    """How a probe is trained, and what is taken from it."""

    method: Literal["path", "joint"] = Field("path", description="errors for a path, or the schedule, trained with it")
    share: float = Field(0.05, gt=0, le=1, description="of the recipe's training steps that the probe takes")
    grid: int = Field(16, ge=2, le=64, description="intervals of each stream's time; joint: of base time")
    images: int = Field(256, gt=0, description="path: on which errors are measured")
    kinetic: float = Field(0.05, ge=0, description="joint: weight of the kinetic energy")


class ProbeStage(Stage[Run]):
    """Trains a probe at independent times and measures its errors at a grid of them, or trains it with a schedule."""

    def __init__(self, run: Run, latents: LatentsStage, settings: ProbeSettings) -> None:
        self.latents, self.sources, self.settings = latents, (latents,), settings
        fields = ("seed", "streams", "transformer", "loss", "train")
        folder, train = run.folder.root / "schedule", probe_training(run.recipe.train, settings.share)
        super().__init__(run, "probe", "sfd learn-schedule", folder, fields, train)
        self.fields |= {"probe": settings.fixed()}

    def inputs(self) -> Mapping[str, Any]:
        """The latents."""
        self.latents.require()
        return {"latents": files.checksum(self.latents.folder / MANIFEST)}

    def results(self) -> tuple[Path, ...]:
        """The measured errors, or the schedule's increments."""
        return (self.folder / (ERRORS if self.settings.method == "path" else INCREMENTS),)

    def work(self) -> None:
        """Train and measure."""
        recipe, latents, train = self.run.recipe, self.latents.latents, cast(TrainSettings, self.train)
        joint, changes = self.settings.method == "joint", {"guide_block": None}
        changes |= {"repa_block": None, "repa_channels": None} if joint else {}
        config = transformer_config(recipe, latents).model_copy(update=changes)
        network = LightningDiT(config, seed=recipe.seed)
        synchronous = build_schedule("synchronous", config.composite.names)  # not used at independent times
        loss = probe_loss(recipe.loss, joint=joint)

        def task(batch_size: int) -> DiffusionTask:
            return DiffusionTask(network, latents, synchronous, loss, seed=recipe.seed, batch_size=batch_size)

        if joint:
            model = JointModel(network, len(recipe.streams), self.settings.grid)
            both = JointTask(model, task(train.batch_size), self.settings.kinetic)
            trained = cast(JointModel, fit(both, train, self.folder, device=self.run.device))
            self._write_result(trained.increments().detach().double().cpu().tolist())
            return
        probe = cast(LightningDiT, fit(task(train.batch_size), train, self.folder, device=self.run.device))
        if distributed.is_main_process():
            images = self.settings.images
            self._measure(probe, task(images).batch(train.steps, range(images)))  # noise that no step has drawn

    def _measure(self, probe: LightningDiT, batch: Mapping[str, Tensor]) -> None:
        train = cast(TrainSettings, self.train)
        moved = {name: to_device(batch[name], self.run.device) for name in ("x1", "x0", "labels")}
        with full_float32():
            errors = measure_errors(probe, probe.config.composite, moved, self.settings.grid, train.batch_size)
        if not np.isfinite(errors).all():
            raise SFDError(f"the probe in {self.folder} gives errors that are not finite; lower train.learning_rate")
        self._write_result(errors.tolist())

    def _write_result(self, by_stream: Sequence[Any]) -> None:
        if distributed.is_main_process():
            named = dict(zip(self.run.recipe.streams, by_stream, strict=True))
            files.write_json(self.results()[0], named, shared=True)

    def found(self) -> np.ndarray:
        """The errors, float64 (2, G + 1, G + 1), or the increments (2, G)."""
        self.require()
        named = files.read_json(self.results()[0], "result of sfd learn-schedule")
        return np.array([named[name] for name in self.run.recipe.streams])


def learn_schedule(probe: ProbeStage, length: float, bend: float) -> Path:
    """Write the learned schedule as a recipe: the best path through the errors, with a picture, or the joint one."""
    recipe, found, names = probe.run.recipe, probe.found(), tuple(probe.run.recipe.streams)
    if probe.settings.method == "joint":
        spec = {"name": "learned", "increments": dict(zip(names, found.tolist(), strict=True))}
    else:
        spec = as_schedule(shortest_path(found, length, bend), names)
        _draw(probe.folder / MAP, recipe, found, build_schedule(spec, names))
    path = probe.folder / RECIPE
    files.write_text(path, dump_recipe(with_schedule(recipe, spec)), shared=True)
    return path


def _draw(path: Path, recipe: Recipe, errors: np.ndarray, learned: Schedule) -> None:
    """Compare schedules by the probe's loss along them, and draw them."""
    names, own = learned.streams, recipe.schedule["name"]
    shown = {"learned": learned, f"recipe: {own}": build_schedule(recipe.schedule, names)}
    shown["synchronous"] = build_schedule("synchronous", names)
    for name, schedule in shown.items():
        say(f"{name}: loss of the probe along it {loss_along(errors, schedule):.4f}, knots {len(schedule.knots)}")
    figure = figures.sensitivities(errors, names, {name: _curve(schedule) for name, schedule in shown.items()})
    with files.atomic_write(path, shared=True) as partial:
        figure.savefig(partial, format="png")


def check_streams(recipe: Recipe) -> None:
    """Refuse recipes whose streams have no schedule to learn."""
    if len(recipe.streams) != 2 or recipe.transformer.clocks == "one":
        raise SFDError(
            f"a schedule is learned for two streams, each with its own time embedding; the recipe has streams "
            f"{', '.join(recipe.streams)} and transformer.clocks {recipe.transformer.clocks!r}"
        )


def with_schedule(recipe: Recipe, spec: dict[str, Any]) -> Recipe:
    """Give the recipe that trains with a learned schedule, every stream on its own time's density."""
    loss = recipe.loss.model_copy(update={"density": "stream", "times": "schedule"})
    return recipe.model_copy(update={"schedule": spec, "loss": loss})


def probe_training(train: TrainSettings, share: float) -> TrainSettings:
    """Shorten training to a share of its steps, with a learning rate and an average that fit them."""
    steps = math.ceil(share * train.steps)
    short = {"steps": steps, "warmup": min(train.warmup, steps // 10), "decay": "cosine", "decay_from": 0}
    short |= {"ema_warmup": True, "preview_every": 0, "init": None}
    return parse(TrainSettings, train.model_dump(mode="json") | short)


def probe_loss(loss: LossSettings, *, joint: bool) -> LossSettings:
    """Train every pair of times alike, or every base time."""
    fields = {"base_time": "uniform", "density": "base", "arrived": 1.0, "guide": None, "stationary_streams": True}
    fields |= {"times": "schedule", "repa": 0.0} if joint else {"times": "independent"}
    return loss.model_copy(update=fields)


def _curve(schedule: Schedule) -> np.ndarray:
    base = torch.tensor(sorted({*np.linspace(0, 1, 65).tolist(), *schedule.knots}), dtype=torch.float64)
    return schedule.at(base).time.numpy()
