"""Training task of the transformer: noised composite latents, velocity targets, and three losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sfd import flow
from sfd.data.shards import FEATURES, LatentSet
from sfd.models.dit import DiTOutput, LightningDiT
from sfd.schedule import Schedule, StreamTimes
from sfd.training.data import EpochOrder
from sfd.utils import rng
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

QUARTERS = 4


class LossSettings(Settings):
    """The objective: velocity + cosine + REPA (Pan et al. 2025), and the distributions of training samples."""

    base_time: flow.BaseTime = Field("logit_normal", description="as the published runs; the paper's text says uniform")
    cosine: float = Field(1.0, ge=0, description="weight of 1 − cos(v̂, v)")
    repa: float = Field(1.0, ge=0, description="weight of the REPA loss; 0: none")
    guide: float | None = Field(
        None, gt=0, description="weight of the second head's velocity and cosine loss; small, such as 0.25"
    )
    stationary_streams: bool = Field(
        True, description="also train the velocity of a stream whose rate is 0, as the published runs"
    )
    arrived: float = Field(
        1.0,
        gt=0,
        le=1,
        description="train streams that have reached time 1 at times drawn from [arrived, 1]: noise on them",
    )
    times: Literal["schedule", "independent"] = Field(
        "schedule", description="independent: each stream's time is drawn by itself, so that any schedule can sample"
    )
    density: Literal["base", "stream"] = Field(
        "base", description="stream: weight losses so that each stream's own time has the density of base_time"
    )
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of samples that are trained on the null class")
    flip: bool = Field(True, description="use both orientations of every image")


class Draws(NamedTuple):
    """Random numbers of a batch of B samples."""

    flip: np.ndarray  # (B,), uniform
    dropout: np.ndarray  # (B,), uniform, of the label
    base_time: np.ndarray  # (B,), standard normal
    noise: np.ndarray  # (B, N), standard normal
    arrived: np.ndarray  # (B,), uniform: time of streams that have reached 1


class DiffusionTask:
    """The `TrainingTask` of the transformer. Every draw is a function of (seed, step, sample)."""

    name = "transformer"

    def __init__(
        self,
        model: LightningDiT,
        latents: LatentSet,
        schedule: Schedule,
        settings: LossSettings,
        *,
        seed: int,
        batch_size: int,
        previewer: Callable[[int, nn.Module, Path], None] | None = None,
    ) -> None:
        """Check that the settings fit latents and network."""
        self.model, self.latents, self.schedule, self.settings = model, latents, schedule, settings
        self.composite, self.null_class, self.previewer = model.config.composite, model.null_class, previewer
        self.seed, self.batch_size = seed, batch_size
        self.order = EpochOrder(seed, len(latents))
        if settings.repa and latents.manifest.features is None:
            raise SFDError(
                f"loss.repa is {settings.repa}, but {latents.folder} holds no features; prepare the latents with "
                "latents.features=true, or set loss.repa=0"
            )
        if settings.repa and model.projector is None:
            raise SFDError("loss.repa needs transformer.repa_block to be set; set it, or set loss.repa=0")
        self._weights = self.composite.per_entry(torch.tensor([s.weight for s in self.composite.streams]))

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give clean latents x1 and noise x0 (B, N), stream times (B, K), labels and images' numbers (B,), features.

        Where stationary streams are left out, also which streams move: (B, K). With `density` "stream", also the weight
        of each stream's loss: (B, K).
        """
        settings, composite = self.settings, self.composite
        indices = self.order.indices(step, samples, self.batch_size)
        draws = self._draw(step, samples)
        flips = (draws.flip < 0.5) & settings.flip
        raw = {name: self.latents.read(name, indices, flips) for name in composite.names}
        labels = self.latents.labels[torch.from_numpy(indices)]
        dropped = torch.from_numpy(draws.dropout < settings.label_dropout)
        u = flow.sample_base_time(torch.from_numpy(draws.base_time), settings.base_time)
        independent = settings.times == "independent"
        time, rate = self._independent(step, samples) if independent else self.schedule.at(u)
        batch = {
            "x1": composite.pack(composite.normalize(raw)),
            "x0": torch.from_numpy(draws.noise),
            "times": time,
            "labels": torch.where(dropped | (self.null_class == 0), self.null_class, labels),
            "indices": torch.from_numpy(indices),
        }
        if settings.density == "stream" and not independent:  # independent times have that density
            batch["weights"] = flow.density_ratio(time, u[:, None], settings.base_time) * rate
        if settings.density == "stream" or not settings.stationary_streams:
            batch["moving"] = rate > 0
        if settings.arrived < 1:
            noised = 1 - (1 - settings.arrived) * torch.from_numpy(draws.arrived).to(time)
            batch["times"] = torch.where((time == 1) & (rate == 0), noised[:, None], time)
        if settings.repa:
            # As stored, in half precision: the loss turns them into float32, on the device.
            batch["features"] = self.latents.read(FEATURES, indices, flips, dtype=None)
        return batch

    def _independent(self, step: int, samples: range) -> StreamTimes:
        """Draw each stream's time by itself."""
        generators = rng.generators(self.seed, "times", step, samples=samples)
        normals = np.stack([g.standard_normal(len(self.composite.streams), dtype=np.float32) for g in generators])
        time = flow.sample_base_time(torch.from_numpy(normals), self.settings.base_time)
        return StreamTimes(time, torch.ones_like(time))

    def _draw(self, step: int, samples: range) -> Draws:
        count = len(samples)
        flip, dropout, arrived = np.empty((3, count))
        base_time = np.empty(count, np.float32)
        noise = np.empty((count, self.composite.size), np.float32)
        # The order of calls fixes the numbers: another would change every run.
        for row, generator in enumerate(rng.generators(self.seed, "sample", step, samples=samples)):
            flip[row], dropout[row] = generator.random(2)
            base_time[row] = generator.standard_normal(dtype=np.float32)
            generator.standard_normal(out=noise[row], dtype=np.float32)
            arrived[row] = generator.random()
        return Draws(flip, dropout, base_time, noise, arrived)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the objective and its parts, each averaged over the batch."""
        x1, x0, times = batch["x1"], batch["x0"], batch["times"]
        x = flow.interpolate(x1, x0, self.composite.per_entry(times))
        target = flow.velocity_target(x1, x0)
        settings = self.settings
        project, second_head = bool(settings.repa), settings.guide is not None
        output: DiTOutput = model(x, times, batch["labels"], project=project, second_head=second_head)
        predicted, guiding = output.velocity, output.guiding
        if "moving" in batch:  # entries that are 0 in both count neither in the squares nor in the cosine
            moving = self.composite.per_entry(batch["moving"])
            predicted, target = predicted * moving, target * moving
            guiding = guiding * moving if guiding is not None else None
        weights = batch.get("weights")
        losses = self._velocity_losses(predicted, target, weights)
        if guiding is not None and settings.guide is not None:
            losses["guide"] = self._velocity_losses(guiding, target, weights)["loss"]
            losses["loss"] = losses["loss"] + settings.guide * losses["guide"]
        if output.projection is not None:
            losses["repa"] = flow.repa_loss(output.projection, batch["features"]).mean()
            losses["loss"] = losses["loss"] + settings.repa * losses["repa"]
        return losses | self._by_stream(predicted, target, times)

    def _velocity_losses(self, predicted: Tensor, target: Tensor, of_streams: Tensor | None) -> dict[str, Tensor]:
        self._weights = self._weights.to(target.device)  # once: each copy would wait for a GPU
        weights = self._weights if of_streams is None else self._weights * self.composite.per_entry(of_streams)
        velocity = flow.velocity_loss(predicted, target, weights).mean()
        losses = {"loss": velocity, "velocity": velocity}
        if self.settings.cosine:
            per_position = self.composite.per_position
            losses["cosine"] = flow.cosine_loss(per_position(predicted), per_position(target)).mean()
            losses["loss"] = velocity + self.settings.cosine * losses["cosine"]
        return losses

    @torch.no_grad()
    def _by_stream(self, velocity: Tensor, target: Tensor, times: Tensor) -> dict[str, Tensor]:
        """Velocity loss per stream, and as pairs (sum, count) per quarter of that stream's time."""
        errors = self.composite.unpack((velocity.float() - target).square())
        record = {}
        for k, (name, error) in enumerate(errors.items()):
            loss = error.flatten(1).mean(1)
            record[f"velocity/{name}"] = loss.mean()
            quarter = (times[:, k] * QUARTERS).long().clamp(max=QUARTERS - 1)
            within = nn.functional.one_hot(quarter, QUARTERS).to(loss.dtype)  # (B, 4)
            # No matrix product, which autocast would round to bf16.
            pairs = torch.stack(((loss[:, None] * within).sum(0), within.sum(0)), 1)
            record |= {f"velocity/{name}/quarter-{q + 1}": pair for q, pair in enumerate(pairs)}
        return record

    def preview(self, step: int, model: nn.Module, folder: Path) -> None:
        """Write a sample grid, where a previewer was given."""
        if self.previewer is not None:
            self.previewer(step, model, folder)
