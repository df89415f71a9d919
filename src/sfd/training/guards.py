"""What training does when a gradient is not finite: skip the step, then go back, then give up with a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfd.training.parallel import whole

# The counters are looked at after so many steps: looking waits for the device.
LOOK_EVERY = 10


class Guard:
    """Counts, on the device, the steps without a finite gradient: in a row, the most in a row, and in all."""

    def __init__(self, device: torch.device) -> None:
        self._in_a_row, self._most, self._total = (torch.zeros((), device=device) for _ in range(3))

    def observe(self, gradient_norm: Tensor) -> Tensor:
        """Count a step; give 1.0 if it must be skipped, else 0.0, still on the device."""
        skip = (~torch.isfinite(gradient_norm)).float()
        self._in_a_row = (self._in_a_row + 1) * skip
        self._most = torch.maximum(self._most, self._in_a_row)
        self._total = self._total + skip
        return skip

    @property
    def total(self) -> Tensor:
        """Steps that were skipped, on the device."""
        return self._total

    def state(self) -> dict[str, int]:
        """Give the counters; waits for the device."""
        return {"in_a_row": int(self._in_a_row), "most": int(self._most), "total": int(self._total)}

    def forgive(self) -> None:
        """Forget the most in a row: what training went back for does not count once more."""
        self._most = torch.zeros_like(self._most)

    def restore(self, state: Mapping[str, int]) -> None:
        """Take the counters of a checkpoint."""
        device = self._total.device
        self._in_a_row, self._most, self._total = (
            torch.tensor(float(state[name]), device=device) for name in ("in_a_row", "most", "total")
        )


def backward(loss: Tensor, share: float) -> None:
    """Add the gradient of `share`·loss; all of it is NaN where the loss is not finite."""
    loss.backward(torch.where(torch.isfinite(loss), share, math.nan).to(loss.dtype))


def examination(network: nn.Module, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe a step that failed, its gradients in place: losses, and the norm of each weight and gradient."""
    norms = {
        name: {"weight": _plain(p.detach().norm()), "gradient": None if p.grad is None else _plain(p.grad.norm())}
        for name, p in network.named_parameters()
    }
    return {"losses": {name: _plain(value) for name, value in losses.items()}, "norms": norms}


def _plain(value: Tensor) -> Any:
    """Give a tensor as JSON has it: what is not finite, as text."""
    numbers = whole(value.detach()).float().tolist()
    each = [numbers] if isinstance(numbers, float) else numbers
    written = [x if math.isfinite(x) else str(x) for x in each]
    return written[0] if isinstance(numbers, float) else written
