"""Training task of a schedule together with a temporary network: the other way to learn one (arXiv 2606.19662).

With base time u uniform, v_k the velocity of stream k of d_k entries and v̂_k the network's, both at the times τ(u),

    J = E Σ_k 1/d_k · ( sg(τ_k′)·‖v̂_k − v_k‖² + λ·‖τ_k′·v̂_k‖² ).

sg stops the gradient: the first term moves the schedule only through the noised latents and the times that the network
is given, so it does not fall by spending less base time where a stream is hard. Its value is the line integral of
`training/schedule_path.py`. The second is the trajectory's kinetic energy, against rates that few steps cannot follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfd import flow
from sfd.models.dit import LightningDiT
from sfd.schedule import StreamTimes
from sfd.training.tasks.diffusion import DiffusionTask

SPEED = 30.0  # of the schedule's parameters, relative to the network's learning rate


class JointOutput(NamedTuple):
    """What the loss needs of a batch."""

    velocity: Tensor  # (B, N), the network's
    rates: Tensor  # (B, K)


class JointModel(nn.Module):
    """A network and the schedule that it is trained on: P increments per stream, positive by a softmax."""

    network: LightningDiT

    def __init__(self, network: LightningDiT, streams: int, intervals: int) -> None:
        """Begin with the synchronous schedule."""
        super().__init__()
        self.network = network
        self.logits = nn.Parameter(torch.zeros(streams, intervals))

    def increments(self) -> Tensor:
        """(K, P), each row of sum 1."""
        return torch.softmax(SPEED * self.logits, dim=1)

    def at(self, u: Tensor) -> StreamTimes:
        """Look up times and rates (B, K) at base times (B,), with gradients to the increments."""
        increments = self.increments()
        intervals = increments.shape[1]
        index = (u * intervals).long().clamp(max=intervals - 1)
        step = increments[:, index].T
        start = (increments.cumsum(1) - increments)[:, index].T
        return StreamTimes(start + step * (u * intervals - index)[:, None], step * intervals)

    def forward(self, x1: Tensor, x0: Tensor, u: Tensor, labels: Tensor) -> JointOutput:
        """Noise data x1 (B, N) with x0 at the schedule's times, and predict the velocity."""
        times, rates = self.at(u)
        x = flow.interpolate(x1, x0, self.network.config.composite.per_entry(times))
        return JointOutput(self.network(x, times, labels).velocity, rates)


class JointTask:
    """The `TrainingTask` of `JointModel`, on the batches of a `DiffusionTask` with a synchronous schedule."""

    name = "schedule"

    def __init__(self, model: JointModel, diffusion: DiffusionTask, kinetic: float) -> None:
        """Take λ as `kinetic`."""
        self.model, self.diffusion, self.kinetic = model, diffusion, kinetic

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give data and noise (B, N), base times and labels (B,)."""
        drawn = self.diffusion.batch(step, samples)
        return {"x1": drawn["x1"], "x0": drawn["x0"], "u": drawn["times"][:, 0], "labels": drawn["labels"]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute J and its two terms."""
        output: JointOutput = model(**batch)
        composite = self.diffusion.composite
        velocity, rates = output.velocity.float(), output.rates
        error = (velocity - flow.velocity_target(batch["x1"], batch["x0"])).square()
        moved = (composite.per_entry(rates) * velocity).square()

        def means(entries: Tensor) -> Tensor:  # over each stream's entries: (B, K)
            return torch.stack([each.flatten(1).mean(1) for each in composite.unpack(entries).values()], 1)

        flow_loss = (rates.detach() * means(error)).sum(1).mean()
        energy = means(moved).sum(1).mean()
        return {"loss": flow_loss + self.kinetic * energy, "velocity": flow_loss, "kinetic": energy}
