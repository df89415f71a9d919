"""The embedded texture encoder: a small `diffusers.AutoencoderKL` on pixel-unshuffled images, trained here.

Pixels are first folded into channels (patch × patch pixels to one position), so that the convolutions, which are the
same as in the published autoencoders, run on a small grid and two processor cores are enough to train them. Beside the
network runs a linear map of whole patches, which starts as their principal components (`start_from`), so that training
begins with a blurred picture and not with none.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from sfd.encoders import TEXTURE, autoencoder_class, check_divisible
from sfd.models.component import Component
from sfd.models.gaussian import DiagonalGaussian
from sfd.utils.config import Settings

START_LOGVAR = -5.0  # of the posterior: a standard deviation of 0.08, for latents of about 1


class Config(Settings):
    """Shape of the autoencoder; it shrinks images by patch · 2^(len(widths) − 1)."""

    kind: ClassVar[str] = TEXTURE
    patch: int = Field(4, ge=1, description="side of the square of pixels that becomes one position")
    widths: tuple[int, ...] = Field((24, 48), min_length=1, description="channels of each level; a halving between two")
    blocks: int = Field(
        1, ge=1, le=1000, description="residual blocks per level in the encoder; the decoder has one more"
    )
    latent_channels: int = Field(16, ge=1)
    attention: bool = Field(False, description="self-attention at the innermost level")
    groups: int = Field(8, ge=1, description="of channels normalised together")

    @model_validator(mode="after")
    def _check(self) -> Config:
        if any(w < 1 or w % self.groups for w in self.widths):
            raise ValueError(f"widths must be positive multiples of groups = {self.groups}, got {self.widths}")
        return self

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.latent_channels

    @property
    def downsample(self) -> int:
        """f: image pixels on a side of one position."""
        return self.patch * 2 ** (len(self.widths) - 1)


class TextureAutoencoder(Component):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H / f, W / f) and back."""

    kind = TEXTURE
    name = "autoencoder_kl"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.downsample = config.channels, config.downsample
        levels = len(config.widths)
        self.net = autoencoder_class()(
            in_channels=3 * config.patch**2,
            out_channels=3 * config.patch**2,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            mid_block_add_attention=config.attention,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        side = self.downsample
        self.linear_in = nn.Conv2d(3, self.channels, side, side)
        self.linear_out = nn.ConvTranspose2d(self.channels, 3, side, side)
        # The network starts as a correction of nothing, with a posterior narrow enough to train through.
        for last in (self.net.encoder.conv_out, self.net.decoder.conv_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        nn.init.constant_(self.net.encoder.conv_out.bias[self.channels :], START_LOGVAR)

    @torch.no_grad()
    def start_from(self, images: Tensor) -> None:
        """Set the linear maps to the principal components of these images' patches, with latents of unit variance.

        Args:
            images: (B, 3, H, W) in [-1, 1]; a thousand are enough.
        """
        side = self.downsample
        check_divisible(images, side)
        patches = F.unfold(images, side, stride=side).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        variance, vectors = torch.linalg.eigh(torch.cov(patches.T))
        scale = variance[-self.channels :].clamp(min=1e-6).sqrt()
        components = vectors[:, -self.channels :].T  # (C, 3·side²), orthonormal rows
        whiten = components / scale[:, None]
        self.linear_in.load_state_dict({"weight": whiten.unflatten(1, (3, side, side)), "bias": -whiten @ mean})
        back = (components * scale[:, None]).unflatten(1, (3, side, side))
        # A transposed convolution has one bias a colour; the rest of the mean patch is left to the network.
        self.linear_out.load_state_dict({"weight": back, "bias": mean.unflatten(0, (3, -1)).mean(1)})

    def moments(self, images: Tensor) -> DiagonalGaussian:
        """Give the posterior of the latents: mean and log-variance, each (B, C, H / f, W / f)."""
        check_divisible(images, self.downsample)
        folded = F.pixel_unshuffle(images, self.config.patch)
        posterior = self.net.encode(folded).latent_dist
        return DiagonalGaussian(posterior.mean + self.linear_in(images), posterior.logvar)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Decode, keeping gradients: (B, C, h, w) to (B, 3, h·f, w·f)."""
        return F.pixel_shuffle(self.net.decode(latents).sample, self.config.patch) + self.linear_out(latents)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct from a draw of the posterior, made with standard normal `noise` (B, C, H / f, W / f)."""
        moments = self.moments(images)
        return self.reconstruct(moments.sample(noise)), moments

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Give the posterior's mean: the same image always has the same latent."""
        return self.moments(images).mean.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode to images, about [-1, 1]."""
        return self.reconstruct(latents)


build = TextureAutoencoder
