"""The Gaussian posterior of a variational autoencoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DiagonalGaussian(NamedTuple):
    """A diagonal Gaussian over latents (B, c, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise of the same shape into a draw: mean + exp(logvar / 2)·noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1), summed over an image's latent: (B,), float32.

        ½ Σ (mean² + exp(logvar) − 1 − logvar), Kingma and Welling 2013, appendix B (arXiv 1312.6114).
        """
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
