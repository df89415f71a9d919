"""How images are sampled: the record that a recipe, a model directory and a folder of samples hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sfd.flow_map import coarsen
from sfd.guidance import GuidedVelocity, guide
from sfd.latents import CompositeLatent
from sfd.models.inference import Precision
from sfd.sampling import DEFAULT_STEPS, MAX_SHIFT, MIN_SHIFT, find_solver, smooth_intervals, time_grids
from sfd.schedule import Schedule
from sfd.solvers import SOLVERS
from sfd.utils.config import Free, Settings
from sfd.utils.errors import SFDError

FLOW_MAP = "flow_map"  # stands for a solver in the settings of distilled models
GUIDED_BY = {"null_class": "the null class", "guiding_model": "a guiding model", "inside": "the second head"}


class SamplingConfig(Settings):
    """How images are sampled."""

    solver: str = Field("multistep", description="euler, heun, multistep, sde, dopri5; of a distilled model flow_map")
    steps: int = Field(DEFAULT_STEPS, gt=0, description="over the whole interval; adaptive solvers choose their own")
    options: dict[str, Any] = Field({}, description="of the solver, such as rtol")
    shift: float = Field(1.0, ge=MIN_SHIFT, le=MAX_SHIFT, description="time shift; below 1: more steps near noise")
    guidance: float | dict[str, float] = Field(1.0, description="scale for all streams, or by stream; 1: none")
    guidance_from: Literal["null_class", "guiding_model", "inside"] = Field(
        "null_class",
        description="what guides: the null class, a less trained model, or the network's second head, at no extra call",
    )
    interval: tuple[float, float] | dict[str, tuple[float, float]] | None = Field(
        None, description="stream times within which to guide, for all streams or by stream; null: throughout"
    )
    batch_size: Free[int] = Field(
        64, gt=0, description="images per batch; changes them by rounding, or as dopri5 allows"
    )
    precision: Precision = Field("float32", description="bf16: matrix products and convolutions")
    compile: Free[bool] = Field(False, description="compile the network, which takes a minute or two")

    @field_validator("steps", "batch_size", "compile", mode="before")
    @classmethod
    def _read_earlier_values(cls, value: Any, info: Any) -> Any:
        """Read null and "auto" as the default, "on" and "off" as YAML reads them without quotes."""
        if value is None or value == "auto":
            return cls.model_fields[info.field_name].default
        return {"on": True, "off": False}[value] if value in ("on", "off") else value

    @property
    def guides(self) -> bool:
        """Whether a stream is guided: its scale is other than 1."""
        scales = self.guidance.values() if isinstance(self.guidance, dict) else (self.guidance,)
        return any(scale != 1 for scale in scales)

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.solver != FLOW_MAP and SOLVERS[self.solver].adaptive

    def unguided(self) -> SamplingConfig:
        """The same settings with the conditional model alone."""
        return self.model_copy(update={"guidance": 1.0, "interval": None})

    @property
    def integration(self) -> dict[str, Any]:
        """What `sampling.integrate` takes."""
        return {"solver": self.solver, "steps": self.steps, "options": self.options, "shift": self.shift}

    def summary(self) -> str:
        """Solver, steps and guidance in a few words."""
        steps = "adaptive steps" if self.adaptive else f"{self.steps} steps"
        source = f" by {GUIDED_BY[self.guidance_from]}" if self.guides and self.guidance_from != "null_class" else ""
        return f"{self.solver}, {steps}, guidance {self.guidance}{source}"

    def check_flow_map(self, grid: Sequence[float]) -> None:
        """Refuse settings of a solver with a distilled model, whose finest steps are `grid`."""
        plain = SamplingConfig(solver=FLOW_MAP, steps=self.steps)
        for name in ("solver", "options", "shift", "guidance", "guidance_from"):
            if getattr(self, name) != getattr(plain, name):
                raise SFDError(
                    f"{name} is {getattr(self, name)!r}, but guidance and steps of a distilled model are part of its "
                    f"weights; leave {name} at {getattr(plain, name)!r}, or sample from its teacher"
                )
        coarsen(grid, self.steps)

    def check(self, schedule: Schedule, latent: CompositeLatent, *, has_guiding: bool) -> list[list[float]]:
        """Refuse settings that do not fit the streams or the schedule, before there is anything to integrate.

        Args:
            schedule, latent: the model's.
            has_guiding: whether what `guidance_from` names is there.

        Returns:
            base times of the steps on each smooth interval, its ends included; see `time_grids`.
        """

        def zero(x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

        if self.solver == FLOW_MAP:
            raise SFDError("solver flow_map is that of a distilled model; distil this one first (sfd distill)")
        solver, _ = find_solver(self.solver, self.options)
        velocity = guide(zero, zero if has_guiding else None, self.guidance, latent, self.interval)
        jumps = velocity.discontinuities if isinstance(velocity, GuidedVelocity) else ()
        return time_grids(smooth_intervals(schedule, jumps), solver, self.steps, self.shift)
