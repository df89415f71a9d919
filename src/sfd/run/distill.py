"""Distil a model into one that samples in a few steps without guidance; resumes as training does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sfd.data.trajectories import TrajectorySet, shard_paths, write_trajectories
from sfd.generation.config import FLOW_MAP, SamplingConfig
from sfd.generation.directory import RECORD
from sfd.generation.model import Model
from sfd.models.dit import LightningDiT, parameter_count
from sfd.run.stages import RunFolder, Stage
from sfd.run.values import apply_override
from sfd.solvers import SOLVERS
from sfd.training.config import TrainSettings
from sfd.training.tasks.distillation import DistillationTask
from sfd.training.trainer import fit
from sfd.utils import distributed, files
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError
from sfd.utils.progress import say

DEFAULT_STEPS = 4
TRAIN = {"steps": 6000, "batch_size": 256, "learning_rate": 5e-4, "warmup": 100, "decay": "cosine", "ema": 0.999}

SETTINGS = "distill.json"  # in the run's folder, from its start


class DistillSettings(Settings):
    """How a student is distilled."""

    seed: int = Field(0, ge=0)
    finest: int = Field(8, gt=0, description="steps of the finest sampling; its half, quarter, … can be chosen too")
    trajectories: int = Field(20_000, gt=0, description="that the teacher makes and the student learns from")
    teacher: SamplingConfig = Field(description="how the teacher samples, its guidance included")
    train: TrainSettings

    @model_validator(mode="after")
    def _check(self) -> DistillSettings:
        solver = SOLVERS.get(self.teacher.solver)
        if solver is None or solver.adaptive or solver.stochastic or self.teacher.steps % self.finest:
            raise ValueError(
                f"the teacher's solver must have fixed steps and draw no noise (multistep, heun, euler), and its steps "
                f"must be a multiple of finest, {self.finest}; got {self.teacher.solver} with {self.teacher.steps}"
            )
        return self


def read_settings(model: Model, overrides: Sequence[str], **teacher: Any) -> DistillSettings:
    """The defaults, the teacher's sampling settings among them, changed by FIELD=VALUE."""
    if model.transformer.config.flow_map:
        raise SFDError("this model is distilled already; give the model that it was distilled from")
    values: dict[str, Any] = {"teacher": model.sampling.model_dump(mode="json") | teacher, "train": dict(TRAIN)}
    finest = DistillSettings.model_fields["finest"].default
    values["teacher"]["steps"] = -(-model.sampling.steps // finest) * finest
    for override in overrides:
        apply_override(values, override, DistillSettings)
    return parse(DistillSettings, values, "sfd distill")


def distill(teacher: Model, settings: DistillSettings, out: Path, guiding: Model | None = None) -> None:
    """Train a student of `teacher`, on its device, into the folder `out`, or resume; write its model directory."""
    teacher.check_sampling(settings.teacher, guiding)
    run = Distillation(teacher, guiding, settings, RunFolder(out))
    trajectories = TrajectoryStage(run)
    stages = (trajectories, StudentStage(run, trajectories))
    for stage in stages:
        stage.check_recipe()
    say(f"teacher: {settings.teacher.summary()}")
    for stage in stages:
        stage.make()


@dataclass(frozen=True)
class Distillation:
    """What both stages are given."""

    record: ClassVar[type[Settings]] = DistillSettings

    teacher: Model
    guiding: Model | None
    settings: DistillSettings
    folder: RunFolder

    @property
    def device(self) -> torch.device:
        """That of the teacher."""
        return self.teacher.device

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """The settings that a result depends on."""
        return self.settings.fixed()

    @property
    def every(self) -> int:
        """Steps of the teacher in one of the student's finest."""
        return self.settings.teacher.steps // self.settings.finest

    def save_recipe(self) -> None:
        """Write the settings of the last accepted command."""
        values = self.settings.model_dump(mode="json")
        files.write_json(self.folder.root / SETTINGS, values, shared=True)

    def identities(self) -> dict[str, Any]:
        """Identify the models that the student learns from."""
        return {"teacher": self.teacher.identity, "guiding model": self.guiding.identity if self.guiding else None}


class TrajectoryStage(Stage[Distillation]):
    """Samples from the teacher, and stores the states at the ends of the student's finest steps."""

    def __init__(self, run: Distillation) -> None:
        folder = run.folder.root / "trajectories"
        fields = ("seed", "finest", "trajectories", "teacher")
        super().__init__(run, "trajectories", "sfd distill", folder, fields)

    def inputs(self) -> dict[str, Any]:
        """The teacher and its guiding model."""
        return self.run.identities()

    def results(self) -> tuple[Path, ...]:
        """The shards."""
        return shard_paths(self.folder, self.run.settings.trajectories)

    def work(self) -> None:
        """Make the missing shards."""
        settings, teacher = self.run.settings, self.run.teacher
        write_trajectories(
            self.folder,
            settings.trajectories,
            self._follow,
            latent=teacher.composite,
            states=settings.finest + 1,
            labels=teacher.labels,
            seed=settings.seed,
            batch_size=settings.teacher.batch_size,
        )
        distributed.barrier()

    def _follow(self, labels: Tensor, noise: Tensor) -> Tensor:
        run, states = self.run, [noise]
        start = noise.to(run.device), labels.to(run.device)
        run.teacher.sample_latents(
            *start, run.settings.teacher, run.guiding, callback=lambda progress: states.append(progress.x.cpu())
        )
        return torch.stack(states[:: run.every], dim=1)


class StudentStage(Stage[Distillation]):
    """Trains the student on stored trajectories."""

    def __init__(self, run: Distillation, trajectories: TrajectoryStage) -> None:
        self.trajectories = trajectories
        fields, folder = tuple(run.fixed), run.folder.training
        super().__init__(run, "student", "sfd distill", folder, fields, run.settings.train)

    def inputs(self) -> dict[str, Any]:
        """The teacher and its guiding model."""
        return self.run.identities()

    def results(self) -> tuple[Path, ...]:
        """The model directory."""
        return (self.run.folder.model / RECORD,)

    def work(self) -> None:
        """Train, and write the model directory."""
        run, settings, train = self.run, self.run.settings, self.run.settings.train
        teacher = run.teacher
        grids = settings.teacher.check(teacher.schedule, teacher.composite, has_guiding=True)
        grid = (0.0, *(u for interval in grids for u in interval[1:]))[:: run.every]  # of the stored states
        network = make_student(teacher.transformer, grid)
        trajectories = TrajectorySet(self.trajectories.folder, settings.trajectories)
        task = DistillationTask(
            network, trajectories, teacher.schedule, grid, seed=settings.seed, batch_size=train.batch_size
        )
        trained = cast(LightningDiT, fit(task, train, self.folder, device=run.device))
        if not distributed.is_main_process():
            return
        history = {"teacher": teacher.identity, "steps": train.steps, "batch_size": train.batch_size}
        history["parameters"] = parameter_count(network.config)
        steps = min(DEFAULT_STEPS, settings.finest)
        sampling = SamplingConfig(solver=FLOW_MAP, steps=steps, batch_size=settings.teacher.batch_size)
        student = replace(teacher, transformer=trained, history=history, saved_identity="", sampling=sampling)
        student.save(run.folder.model)


def make_student(teacher: LightningDiT, grid: Sequence[float]) -> LightningDiT:
    """Copy a network, and give it a second time embedding per stream, which changes nothing yet."""
    fields = {"flow_map": tuple(grid), "guide_block": None, "repa_block": None, "repa_channels": None}
    student = LightningDiT(teacher.config.model_copy(update=fields))
    own = student.state_dict()
    student.load_state_dict(own | {name: t for name, t in teacher.state_dict().items() if name in own})
    return student
