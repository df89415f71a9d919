"""Training of the embedded texture autoencoder."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from sfd.data.images import ImageSource, to_tensor
from sfd.encoders.autoencoder_kl import TextureAutoencoder
from sfd.training.data import ImageTask
from sfd.utils import rng
from sfd.utils.config import Settings

START_IMAGES = 2000  # from which the texture autoencoder takes its first linear maps


class TextureObjective(Settings):
    """The training loss: pixels |x̂ − x| + mse·(x̂ − x)² + gradient·|∇x̂ − ∇x| + kl·KL.

    All but KL are means over an image's entries; KL is summed over an image's latent.
    """

    mse: float = Field(1.0, ge=0)
    gradient: float = Field(0.5, ge=0, description="differences of neighbouring pixels: sharp edges, no seams")
    kl: float = Field(1e-6, ge=0)


class TextureTask(ImageTask):
    """Train a texture autoencoder to reconstruct images."""

    name = "texture encoder"
    Objective = TextureObjective

    def __init__(
        self, encoder: TextureAutoencoder, source: ImageSource, objective: TextureObjective, **how: int
    ) -> None:
        """See `ImageTask`."""
        super().__init__(encoder, source, objective, **how)
        grid = source.image_size // encoder.downsample
        self.latent_shape = (encoder.channels, grid, grid)
        # The starting point is made again on every start; a checkpoint, if there is one, takes its place.
        first = rng.generator(self.seed, "start").permutation(len(source))[:START_IMAGES]
        encoder.start_from(to_tensor(source.load(first)))

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give images and the noise that their latents are drawn with."""
        noise = self.normal("posterior", step, samples, self.latent_shape)
        return super().batch(step, samples) | {"noise": noise}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the objective; `psnr` (dB) is also logged."""
        reconstruction, moments = model(batch["images"], batch["noise"])
        # Sums over pixels are taken in float32 whatever the network ran in.
        error = reconstruction.float() - batch["images"]
        absolute, mse = error.abs().mean(), error.square().mean()
        gradient = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
        kl = moments.kl().mean()
        weights = self.objective
        return {
            "loss": absolute + weights.mse * mse + weights.gradient * gradient + weights.kl * kl,
            "absolute": absolute,
            "kl": kl,
            "psnr": -10 * torch.log10(mse.detach() / 4),
        }
