"""Training task of a few-step student: the mean velocities of its teacher's trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sfd import flow
from sfd.data.trajectories import TrajectorySet
from sfd.flow_map import mean_velocity, step_counts
from sfd.models.dit import DiTOutput, LightningDiT
from sfd.schedule import Schedule
from sfd.training.data import EpochOrder
from sfd.utils import rng


class DistillationTask:
    """The `TrainingTask` of a student. Every draw is a function of (seed, step, sample).

    A sample is one step of one trajectory: of each size (1, 1/2, 1/4, … of the whole) with equal probability, anywhere.
    Targets are exact up to the error of the teacher's solver, which the student's own errors do not enter.
    """

    name = "student"

    def __init__(
        self,
        model: LightningDiT,
        trajectories: TrajectorySet,
        schedule: Schedule,
        grid: Sequence[float],
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        """Take a student whose weights are its teacher's, and the base times (G + 1,) of the trajectories' states."""
        self.model, self.trajectories, self.seed, self.batch_size = model, trajectories, seed, batch_size
        self.composite, self.counts = model.config.composite, step_counts(len(grid) - 1)
        self.times = schedule.at(torch.tensor(grid, dtype=torch.float64)).time.float()  # (G + 1, K)
        self.order = EpochOrder(seed, len(trajectories))
        self._weights = self.composite.per_entry(torch.tensor([s.weight for s in self.composite.streams]))

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give states x (B, N), target mean velocities m (B, N), times and ends (B, K), labels and step counts (B,)."""
        indices = self.order.indices(step, samples, self.batch_size)
        uniforms = np.array([g.random(2) for g in rng.generators(self.seed, "step", step, samples=samples)])
        counts = np.array(self.counts)[(uniforms[:, 0] * len(self.counts)).astype(np.int64)]
        length = self.counts[-1] // counts
        first = (uniforms[:, 1] * counts).astype(np.int64) * length
        x, after, labels = self.trajectories.read(indices, first, first + length)
        times, ends = self.times[first], self.times[first + length]
        target = mean_velocity(x, after, self.composite.per_entry(ends - times))
        sizes = torch.from_numpy(counts)
        return {"x": x, "target": target, "times": times, "ends": ends, "labels": labels, "counts": sizes}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weighted squared error of the streams that move, and its mean by number of steps."""
        output: DiTOutput = model(batch["x"], batch["times"], batch["labels"], ends=batch["ends"])
        self._weights = self._weights.to(output.velocity.device)
        moving = self.composite.per_entry(batch["ends"] > batch["times"])
        errors = flow.velocity_loss(output.velocity, batch["target"], self._weights * moving)
        parts = {}
        for count in self.counts:
            within = (batch["counts"] == count).to(errors.dtype)
            parts[f"steps-{count}"] = torch.stack(((errors.detach() * within).sum(), within.sum()))
        return {"loss": errors.mean(), **parts}
