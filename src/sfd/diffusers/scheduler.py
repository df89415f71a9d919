"""Steps over base time as a diffusers scheduler.

For stream k, dx_k/du = τ_k′(u)·v_k (`sfd.sampling`). The scheduler owns u: where its steps lie between the knots, what
each stream's time and rate are there, and how a velocity becomes the next state. Results are those of `sfd.integrate`.
Of a distilled model it takes the steps of `sfd.flow_map.take_steps`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from sfd.flow_map import coarsen
from sfd.sampling import SmoothInterval, smooth_intervals, time_grids, undivided
from sfd.schedule import Schedule, StreamTimes, build_schedule
from sfd.solvers import SOLVERS, History, add_integral
from sfd.utils.errors import SFDError, unknown

logger = logging.getLogger(__name__)
EVALUATIONS = {"euler": 1, "heun": 2, "multistep": 1, "flow_map": 1}  # of the network in a step


class Evaluation(NamedTuple):
    """One evaluation of the velocity within a step."""

    u: float  # base time of the evaluation
    start: float  # of the step
    end: float
    interval: SmoothInterval
    first: bool  # of the interval: a multistep method has no history yet
    last: bool  # of the step


class SFDScheduler(SchedulerMixin, ConfigMixin):
    """Lays steps between a schedule's knots and takes them by Euler's, Heun's or a multistep method."""

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        streams: list[str],
        sizes: list[int],
        schedule: dict[str, Any],
        solver: str = "multistep",
        solver_order: int = 3,
        shift: float = 1.0,
        flow_map: Sequence[float] = (),
    ) -> None:
        """Store the schedule.

        Args:
            streams: names of the K streams in packed order.
            sizes: number of entries of each.
            schedule: its name and options, as for `sfd.build_schedule`.
            solver: euler, heun or multistep; of a distilled model flow_map.
            solver_order: 2 or 3, of the multistep method.
            shift: time shift of the steps, from 0.01 to 100; less than 1 puts more of them near noise.
            flow_map: base times of a distilled model's finest steps, both ends included; (): it predicts velocities.
        """
        if solver not in EVALUATIONS:
            raise unknown("solver of the scheduler", solver, EVALUATIONS)
        if solver_order not in (2, 3):
            raise SFDError(f"solver_order must be 2 or 3, got {solver_order}")
        if (solver == "flow_map") != bool(flow_map):
            raise SFDError(
                f"solver is {solver}, but distilled models take flow_map, and only they; leave it as exported"
            )
        self.schedule: Schedule = build_schedule(schedule, streams)
        self.order = EVALUATIONS[solver]
        self.set_timesteps(len(flow_map) - 1 if flow_map else max(25, len(self.schedule.segments)))

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        *,
        jumps: Sequence[Sequence[float]] = (),
    ) -> None:
        """Lay out the steps.

        Args:
            num_inference_steps: at least one per smooth interval (fewer are raised to that, with a warning); a
                distilled model knows its own numbers.
            device: of `timesteps`.
            jumps: for each stream, the times at which the velocity jumps; see `sfd.sampling.smooth_intervals`.
        """
        solver, shift = self.config["solver"], self.config["shift"]
        if self.config["flow_map"]:
            intervals = [undivided(self.schedule)]
            grids = [list(coarsen(self.config["flow_map"], num_inference_steps))]
        else:
            intervals, given = smooth_intervals(self.schedule, jumps), num_inference_steps
            if 0 < given < len(intervals):
                num_inference_steps = len(intervals)
                logger.warning(f"{num_inference_steps} steps are taken instead of {given}: one per smooth interval")
            grids = time_grids(intervals, SOLVERS[solver], num_inference_steps, shift)
        self.evaluations = [
            Evaluation(u, start, end, interval, start == grid[0], u == (end if self.order == 2 else start))
            for interval, grid in zip(intervals, grids, strict=True)
            for start, end in pairwise(grid)
            for u in (start, end)[: self.order]
        ]
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor([each.u for each in self.evaluations], dtype=torch.float32, device=device)
        self._index = 0
        self._history: History = []
        self._predicted = self._corrected = torch.empty(0)

    @property
    def step_index(self) -> int:
        """Number of evaluations so far."""
        return self._index

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation that is next."""
        if self._index >= len(self.evaluations):
            raise SFDError("all steps have been taken; call set_timesteps to begin again")
        return self.evaluations[self._index]

    def stream_times(self) -> StreamTimes:
        """Time and rate (K,) of each stream at the next evaluation, float64, on the CPU; a flow map has mean rates."""
        now = self.evaluation
        found = self.schedule.at(torch.tensor(now.u, dtype=torch.float64), now.interval.segment)
        if self.config["flow_map"]:
            return StreamTimes(found.time, (self.end_times() - found.time) / (now.end - now.start))
        return found

    def end_times(self) -> Tensor:
        """Time (K,) of each stream at the end of the step, which a flow map is given, float64, on the CPU."""
        return self.schedule.at(torch.tensor(self.evaluation.end, dtype=torch.float64)).time

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Give the input back: the network takes states as they are."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_k = τ_k(u)·x1_k + (1 − τ_k(u))·x0_k for base times u (B,) and packed latents (B, N)."""
        t = self.schedule.at(timesteps.cpu().double()).time
        t = t.repeat_interleave(torch.tensor(self.config["sizes"]), dim=-1)
        return torch.lerp(noise, original_samples, t.to(original_samples))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Advance by one evaluation.

        Args:
            model_output: the velocity (B, N) at `sample` and `stream_times()`.
            timestep: the base time of the evaluation, an entry of `timesteps`; the scheduler keeps count by itself.
            sample: (B, N). It may be another one than the step before gave: what was changed stays changed.
            generator: not used; the solvers are deterministic.
            return_dict: give a record whose `prev_sample` is the next state; False: a tuple.
        """
        now = self.evaluation
        rates = self.stream_times().rate.tolist()
        parts = model_output.to(sample.dtype).split(list(self.config["sizes"]), dim=1)
        dxdu = torch.cat([part * rate for part, rate in zip(parts, rates, strict=True)], dim=1)
        after = getattr(self, f"_{self.config['solver']}")(dxdu, sample, now)
        self._index += 1
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def _euler(self, dxdu: Tensor, x: Tensor, now: Evaluation) -> Tensor:
        return x + (now.end - now.start) * dxdu

    _flow_map = _euler

    def _heun(self, dxdu: Tensor, x: Tensor, now: Evaluation) -> Tensor:
        h = now.end - now.start
        if not now.last:
            self._begun = x, dxdu
            return x + h * dxdu
        start, slope = self._begun
        return start + h / 2 * (slope + dxdu)

    def _multistep(self, dxdu: Tensor, x: Tensor, now: Evaluation) -> Tensor:
        """Correct the step before, predict this one; see `sfd.solvers.multistep`."""
        history = [] if now.first else self._history
        nodes = [*history, (now.u, dxdu)][-self.config["solver_order"] :]
        corrected = x
        if history:
            corrected = add_integral(self._corrected, nodes, history[-1][0], now.u)
            if x is not self._predicted:
                corrected = corrected + (x - self._predicted)
        elif self._history:
            corrected = self._joined(dxdu, x, now)
        self._corrected, self._history = corrected, nodes
        self._predicted = add_integral(corrected, nodes, now.start, now.end)
        return self._predicted

    def _joined(self, dxdu: Tensor, x: Tensor, now: Evaluation) -> Tensor:
        """Correct the last step of the interval before in x (B, N), given dx/du there; see `sfd.solvers.Seam`."""
        before, sizes = self.evaluations[self._index - 1].interval, list(self.config["sizes"])
        end = torch.tensor(before.end, dtype=torch.float64)
        earlier, rates = self.schedule.at(end, before.segment).rate.tolist(), self.stream_times().rate.tolist()
        chosen = [joined and rate > 0 for joined, rate in zip(now.interval.joined, rates, strict=True)]
        ratios = [a / b if take else 0.0 for a, b, take in zip(earlier, rates, chosen, strict=True)]
        f = torch.cat([part * ratio for part, ratio in zip(dxdu.split(sizes, 1), ratios, strict=True)], dim=1)
        nodes = [*self._history, (before.end, f)][-self.config["solver_order"] :]
        moved = add_integral(self._corrected, nodes, self._history[-1][0], before.end) - self._predicted
        pairs = zip(x.split(sizes, 1), moved.split(sizes, 1), chosen, strict=True)
        return torch.cat([part + change if take else part for part, change, take in pairs], dim=1)

    def __len__(self) -> int:
        return len(self.evaluations)
