"""Training settings of a recipe, and the learning rate and EMA decay of each step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sfd.utils.config import Free, PathText, Settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(Settings):
    """How a task is optimised: AdamW with warm-up, clipping and an exponential moving average (EMA) of the weights.

    The `Free` fields do not change the arithmetic of a run without failures, except for the order of sums
    (`accumulate`, `compile`). `steps` is free because a run may be extended; `fit` checks when.
    """

    steps: Free[int] = Field(gt=0)
    batch_size: int = Field(gt=0, description="global: over all ranks and micro-batches")
    learning_rate: float = Field(gt=0)
    init: Free[PathText | None] = Field(
        None, description="of the transformer: a model's directory or a run's folder to start from; null: fresh weights"
    )
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "cosine"] = Field("constant", description="cosine falls to a tenth at the last step")
    decay_from: int = Field(0, ge=0, description="step at which the cosine begins")
    ema: float | None = Field(None, ge=0, lt=1, description="decay of the EMA of the weights; null: none")
    ema_warmup: bool = Field(False, description="shorter average in early steps: decay min(ema, (1+step)/(10+step))")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    precision: Literal["float32", "bf16"] = "float32"
    accumulate: Free[int] = Field(1, gt=0, description="micro-batches per rank and step")
    compile: Free[bool] = Field(False, description="compile the network, which takes minutes before the first step")
    workers: Free[int | None] = Field(
        None, gt=0, description="threads that prepare batches; null: one where the CPU trains, else up to 8"
    )
    checkpoint_every: Free[int] = Field(1000, gt=0)
    keep_checkpoints: Free[int] = Field(2, gt=0, description="number of newest checkpoints to keep")
    keep_every: Free[int | None] = Field(None, gt=0, description="also keep the multiples of this step")
    log_every: Free[int] = Field(20, gt=0)
    preview_every: Free[int] = Field(0, ge=0, description="steps between sample grids; 0: none")
    max_skipped: Free[int] = Field(10, gt=0, description="stop after this many steps in a row without finite gradient")
    data_offset: Free[int] = Field(
        0, ge=0, description="from now on use the data order and noise of step + data_offset, to get past a failure"
    )

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.warmup > self.steps:
            raise ValueError(
                f"warmup is {self.warmup} steps, but training ends after {self.steps}; lower warmup or raise steps"
            )
        if self.decay == "cosine" and self.decay_from >= self.steps:
            raise ValueError(
                f"decay_from is {self.decay_from}, but training ends after {self.steps} steps; lower decay_from, "
                "raise steps, or set decay to constant"
            )
        return self

    def checkpoint_due(self, step: int) -> bool:
        """Tell whether a step ends with a checkpoint."""
        return step % self.checkpoint_every == 0 or bool(self.keep_every and step % self.keep_every == 0)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Compute the learning rate of a step: linear warm-up, then constant or a cosine to a tenth."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.decay == "constant" or step < settings.decay_from:
        return rate
    progress = (step - settings.decay_from) / max(settings.steps - settings.decay_from, 1)
    return rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def ema_decay(settings: TrainSettings, step: int) -> float:
    """Compute the decay β of the moving average after a step: ema ← β·ema + (1 − β)·weights."""
    return min(settings.ema or 0.0, (1 + step) / (10 + step) if settings.ema_warmup else 1.0)
