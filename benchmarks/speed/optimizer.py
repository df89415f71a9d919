"""AdamW and the weights' average: tensor by tensor, in two calls over all tensors as training does it, and in one pass.

One pass needs all weights in one flat tensor and a compiled function; it is what two calls are measured against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.measuring import Row, Setting, best_times, network
from sfd.models.inference import cannot_compile

DECAY = 1e-4


class Weights:
    """Weights with gradients, and their average."""

    def __init__(self, tensors: list[Tensor], *, fused: bool) -> None:
        self.weights = [t.detach().clone().requires_grad_() for t in tensors]
        self.average = [t.detach().clone() for t in tensors]
        for weight in self.weights:
            weight.grad = torch.ones_like(weight)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-5, fused=fused, foreach=False if not fused else None)

    @torch.no_grad()
    def by_tensor(self) -> None:
        """Update the average weight by weight."""
        self.optimizer.step()
        for average, weight in zip(self.average, self.weights, strict=True):
            average.mul_(1 - DECAY).add_(weight, alpha=DECAY)

    @torch.no_grad()
    def together(self) -> None:
        """Update the average in one call."""
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.weights, DECAY)


def one_pass(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, average: Tensor) -> None:
    """Do AdamW's arithmetic and the average's, in place, for one flat tensor; corrections as of a late step."""
    mean.lerp_(gradient, 0.1)
    square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    weight.mul_(1 - 1e-5 * 0.01).sub_(1e-5 * mean / (square.sqrt() + 1e-8))
    average.lerp_(weight, DECAY)


def optimizer(setting: Setting) -> list[Row]:
    """Milliseconds of an update of all weights, for each size."""
    rows, device = [], setting.device
    for size, _ in setting.sizes:
        tensors = [p.detach().to(device) for p in network(size).parameters()]
        plain, fast = Weights(tensors, fused=False), Weights(tensors, fused=True)
        ways: dict[str, Callable[[], None]] = {"tensor by tensor": plain.by_tensor, "two calls": fast.together}
        if cannot_compile(device) is None:
            flat = [torch.rand(sum(t.numel() for t in tensors), device=device) for _ in range(5)]
            compiled = torch.compile(one_pass)
            ways["one pass"] = lambda compiled=compiled, flat=flat: compiled(*flat)
        times = best_times(ways, max(setting.repeats, 10), device)
        rows += [
            {"size": size, "way": name, "milliseconds": 1e3 * seconds, "ratio": times["tensor by tensor"] / seconds}
            for name, seconds in times.items()
        ]
    return rows
