"""Training task of the SemVAE, on features of a frozen encoder that are computed on the fly."""

from __future__ import annotations

from torch import Tensor, nn

from sfd.data.images import ImageSource
from sfd.encoders import SemanticEncoder
from sfd.models.compressor import check_channels
from sfd.models.semvae import SemVAE, SemVAEObjective, reconstruction_losses
from sfd.training.data import ImageTask


class SemVAETask(ImageTask):
    """Train a SemVAE to reconstruct the features of an encoder, which is frozen and on the device of training."""

    name = "SemVAE"

    def __init__(
        self, semvae: SemVAE, encoder: SemanticEncoder, source: ImageSource, objective: SemVAEObjective, **how: int
    ) -> None:
        """See `ImageTask`; the SemVAE's `input_channels` are the encoder's channels."""
        super().__init__(semvae, source, objective, **how)
        check_channels(encoder.channels, semvae.config.input_channels)
        self.encoder = encoder
        grid = source.image_size // encoder.downsample
        self.latent_shape = (semvae.channels, grid, grid)

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give images and the noise that their latents are drawn with."""
        noise = self.normal("posterior", step, samples, self.latent_shape)
        return super().batch(step, samples) | {"noise": noise}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the objective."""
        features = self.encoder.encode(batch["images"]).float()
        reconstruction, moments = model(features, batch["noise"])
        mse, cosine = reconstruction_losses(reconstruction.float(), features, self.objective.cosine_over)
        kl = moments.kl().mean()
        weights = self.objective
        loss = weights.mse * mse + weights.cosine * cosine + weights.kl * kl
        return {"loss": loss, "mse": mse, "cosine": cosine, "kl": kl}
