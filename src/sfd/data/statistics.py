"""Mean and standard deviation per channel, gathered over a data set that does not fit in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Images that are turned to float64 at a time: a fixed number, because the last bits of a sum depend on it.
_CHUNK = 256


class ChannelStatistics:
    """Merges batches in float64 by Chan's parallel update (Chan, Golub & LeVeque 1983), whatever their sizes."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """Take in latents (B, channels, h, w)."""
        for chunk in latents.split(_CHUNK):
            values = chunk.cpu().double().transpose(0, 1).flatten(1)
            mean = values.mean(1)
            self._merge(values.shape[1], mean, (values - mean[:, None]).square().sum(1))

    @property
    def std(self) -> Tensor:
        """The unbiased standard deviation, as the published statistics have it."""
        return (self._squares / max(self.count - 1, 1)).sqrt()

    def record(self) -> dict[str, Any]:
        """Give what was gathered as plain values, exact to the last bit, to be kept and merged later."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self._squares.tolist()}

    def merge(self, record: dict[str, Any]) -> None:
        """Take in what was gathered elsewhere."""
        mean, squares = (torch.tensor(record[name], dtype=torch.float64) for name in ("mean", "squares"))
        self._merge(record["count"], mean, squares)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total, shift = self.count + count, mean - self.mean
        self._squares += squares + shift.square() * self.count * count / total
        self.mean = self.mean + shift * count / total
        self.count = total
