"""Mean and standard deviation per channel, gathered over a data set that does not fit in memory."""

from __future__ import annotations

import torch
from torch import Tensor


class ChannelStatistics:
    """Merges batches in float64 by Chan's parallel update (Chan, Golub & LeVeque 1983), whatever their sizes."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """Take in a batch (B, channels, h, w)."""
        values = latents.double().cpu().transpose(0, 1).flatten(1)
        count, mean = values.shape[1], values.mean(1)
        total, shift = self.count + count, mean - self.mean
        self._squares += (values - mean[:, None]).square().sum(1) + shift.square() * self.count * count / total
        self.mean = self.mean + shift * count / total
        self.count = total

    @property
    def std(self) -> Tensor:
        """The unbiased standard deviation, as the published statistics have it."""
        return (self._squares / max(self.count - 1, 1)).sqrt()
