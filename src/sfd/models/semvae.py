"""SemVAE: a small transformer autoencoder that compresses features to the semantic latent (Pan et al. 2025).

Features (B, C, h, w) are read as h·w tokens. There is no position embedding: what a token says of its place is what the
encoder put there. Modules are laid out and named as in the published checkpoints.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from sfd.models.compressor import Compressor, check_channels
from sfd.models.gaussian import DiagonalGaussian
from sfd.utils.config import Settings

LOGVAR_RANGE = (-30.0, 20.0)


class SemVAEConfig(Settings):
    """Shape of a `SemVAE`; the defaults are the published one's, for DINOv2 ViT-B features."""

    input_channels: int = Field(768, ge=1, description="C of the features")
    latent_channels: int = Field(16, ge=1)
    width: int = Field(768, ge=1, description="of the hidden tokens")
    heads: int = Field(6, ge=1)
    blocks: int = Field(4, ge=1, le=1000, description="transformer blocks in the encoder, and as many in the decoder")

    @model_validator(mode="after")
    def _check(self) -> SemVAEConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self


class SemVAEObjective(Settings):
    """The training loss: mse·(f̂ − f)² + cosine·(1 − cos(f̂, f)) + kl·KL; f: features, KL: summed over an image."""

    mse: float = Field(1.0, ge=0)
    cosine: float = Field(1.0, ge=0)
    kl: float = Field(1e-7, ge=0)
    cosine_over: Literal["channels", "tokens"] = Field(
        "channels", description="'tokens' is what the published code does: the similarity of each channel's token row"
    )


class SemVAE(Compressor):
    """Features (B, C, h, w) to the moments of latents (B, c, h, w) and back, on any grid."""

    name = "semvae"
    config: SemVAEConfig

    def __init__(self, config: SemVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.latent_channels
        self.encoder = _tower(config, config.input_channels, 2 * config.latent_channels)
        self.decoder = _tower(config, config.latent_channels, config.input_channels)

    def moments(self, features: Tensor) -> DiagonalGaussian:
        """Give the posterior of the latents: mean and log-variance, each (B, c, h, w)."""
        check_channels(features.shape[1], self.config.input_channels)
        mean, logvar = _by_position(self.encoder, features).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(*LOGVAR_RANGE))

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct from a draw of the posterior, made with standard normal `noise` (B, c, h, w)."""
        moments = self.moments(features)
        return _by_position(self.decoder, moments.sample(noise)), moments

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """Give the posterior's mean: equal features always have equal latents."""
        return self.moments(features).mean.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Give back features (B, C, h, w)."""
        return _by_position(self.decoder, latents)


def reconstruction_losses(
    reconstruction: Tensor, features: Tensor, cosine_over: Literal["channels", "tokens"] = "channels"
) -> tuple[Tensor, Tensor]:
    """Compute the mean squared error and the mean of 1 − cos between features (B, C, h, w).

    The cosine is taken over the channels of each position or, `cosine_over` = "tokens", over the positions of each
    channel.
    """
    dim = 1 if cosine_over == "channels" else 2
    cosine = F.cosine_similarity(reconstruction.flatten(2), features.flatten(2), dim=dim)
    return F.mse_loss(reconstruction, features), (1 - cosine).mean()


def _tower(config: SemVAEConfig, channels_in: int, channels_out: int) -> nn.Sequential:
    """Tokens (B, T, C) to (B, T, D): linear, pre-norm transformer blocks, LayerNorm, linear."""
    blocks = (_Block(config.width, config.heads) for _ in range(config.blocks))
    last = nn.LayerNorm(config.width), nn.Linear(config.width, channels_out)
    return nn.Sequential(nn.Linear(channels_in, config.width), *blocks, *last)


def _by_position(tower: nn.Module, x: Tensor) -> Tensor:
    """Apply a tower to the positions of (B, C, h, w)."""
    return tower(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


class _Block(nn.Module):
    """Tokens (B, T, D) to the same: attention, then a GELU MLP four times as wide, each normalised and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm1(tokens)
        tokens = tokens + self.attn(normal, normal, normal, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


Config, build = SemVAEConfig, SemVAE  # what `component.load` takes
