"""How training is set up: the record in a recipe, and what follows from it for each step."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from sfd.utils.config import Settings

# What may differ between a run and its continuation: none of it changes the arithmetic of a run that goes well, but
# for the order of sums (`accumulate`, `parallel`, `compile`).
FREE_TO_CHANGE = {
    "steps",
    "accumulate",
    "parallel",
    "compile",
    "workers",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "log_every",
    "preview_every",
    "max_skipped",
    "max_rollbacks",
}


class TrainSettings(Settings):
    """How a task is optimised: AdamW with warm-up, clipping and an exponential moving average (EMA) of the weights."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="over all processes and accumulation steps together")
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "cosine"] = Field("constant", description="cosine falls to a tenth at the last step")
    decay_from: int = Field(0, ge=0, description="step at which the cosine begins")
    ema: float | None = Field(None, ge=0, lt=1, description="decay of the weights' moving average; null: none")
    ema_warmup: bool = Field(False, description="let early averages forget faster: decay min(ema, (1+step)/(10+step))")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    precision: Literal["float32", "bf16"] = "float32"
    accumulate: int = Field(1, gt=0, description="backward passes a step")
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="several processes each hold the whole network (ddp) or a share of it (fsdp); auto: ddp"
    )
    compile: bool = Field(False, description="compile the network, which takes minutes before the first step")
    workers: int | None = Field(
        None, gt=0, description="threads that prepare batches; null: one where the CPU trains, else up to 8"
    )
    checkpoint_every: int = Field(1000, gt=0)
    keep_checkpoints: int = Field(2, gt=0, description="the newest so many stay")
    keep_every: int | None = Field(None, gt=0, description="those at multiples of so many steps stay too; null: none")
    log_every: int = Field(20, gt=0)
    preview_every: int = Field(0, ge=0, description="steps between sample grids; 0: none")
    max_skipped: int = Field(10, gt=0, description="so many steps in a row without a finite gradient: a rollback")
    max_rollbacks: int = Field(3, ge=0, description="returns to the last good checkpoint before training gives up")

    def regular(self, step: int) -> bool:
        """Tell whether a checkpoint is due at a step, however the run went."""
        return step % self.checkpoint_every == 0 or bool(self.keep_every and step % self.keep_every == 0)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Give the learning rate of a step: linear warm-up, then constant or a cosine to a tenth."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.decay == "constant" or step < settings.decay_from:
        return rate
    progress = (step - settings.decay_from) / max(settings.steps - settings.decay_from, 1)
    return rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def average_weight(settings: TrainSettings, step: int) -> float:
    """Give the share of the present weights in the moving average after a step; 1 where there is no average."""
    if settings.ema is None:
        return 1.0
    return 1 - min(settings.ema, (1 + step) / (10 + step) if settings.ema_warmup else 1.0)


def lasting(settings: TrainSettings | None) -> dict[str, Any] | None:
    """Give the settings that a result depends on, but for how long training goes on."""
    return settings.model_dump(exclude=FREE_TO_CHANGE) if settings else None


def extent(settings: TrainSettings | None) -> dict[str, int]:
    """Give how long training goes on."""
    return {"steps": settings.steps} if settings else {}
