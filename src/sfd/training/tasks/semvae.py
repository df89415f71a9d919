"""Training task of the SemVAE, on features of a frozen encoder that are computed on the fly."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from sfd.data.images import ImageSource
from sfd.encoders import SemanticEncoder
from sfd.models.semvae import SemVAE, SemVAEObjective, reconstruction_losses
from sfd.training.data import ImageBatches
from sfd.utils.errors import SFDError


class SemVAETask:
    """Train a SemVAE to reconstruct an encoder's features.

    Args:
        semvae: its `input_channels` are the encoder's channels.
        encoder: frozen, on the device that training runs on.
        source: images to encode; each is seen in both orientations.
        objective: the loss.
        seed: of the order, the flips and the posterior's noise.
        batch_size: of the global batch.
    """

    name = "SemVAE"

    def __init__(
        self,
        semvae: SemVAE,
        encoder: SemanticEncoder,
        source: ImageSource,
        objective: SemVAEObjective,
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        if semvae.config.input_channels != encoder.channels:
            raise SFDError(
                f"the SemVAE takes features of {semvae.config.input_channels} channels, but the encoder gives "
                f"{encoder.channels}; set input_channels to that"
            )
        self.model: nn.Module = semvae
        self.encoder, self.objective = encoder, objective
        self.data = ImageBatches(source, seed, batch_size)
        grid = source.image_size // encoder.downsample
        self.latent_shape = (semvae.channels, grid, grid)

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give images and the noise that their latents are drawn with."""
        noise = self.data.normal("posterior", step, samples, self.latent_shape)
        return self.data.batch(step, samples) | {"noise": noise}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the objective."""
        features = self.encoder.encode(batch["images"]).float()
        reconstruction, moments = model(features, batch["noise"])
        mse, cosine = reconstruction_losses(reconstruction.float(), features, self.objective.cosine_over)
        kl = moments.kl().mean()
        weights = self.objective
        loss = weights.mse * mse + weights.cosine * cosine + weights.kl * kl
        return {"loss": loss, "mse": mse, "cosine": cosine, "kl": kl}

    def finish(self, model: nn.Module) -> SemVAE:
        """Take the SemVAE out of what `fit` returned."""
        return cast(SemVAE, model)
