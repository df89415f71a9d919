"""Principal components as the compressor of features: linear, fitted in one pass, the baseline of the SemVAE."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sfd.models.compressor import Compressor, check_channels
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError


class PCAConfig(Settings):
    """Shape of a `PCA`."""

    input_channels: int = Field(ge=1, description="C of the features")
    latent_channels: int = Field(ge=1)
    whiten: bool = Field(False, description="scale every latent channel to unit variance")
    standardize: bool = Field(False, description="scale every channel of the features to unit variance first")

    @model_validator(mode="after")
    def _check(self) -> PCAConfig:
        if self.latent_channels > self.input_channels:
            raise ValueError(f"{self.latent_channels} components cannot be had of {self.input_channels} channels")
        return self


class PCA(Compressor):
    """Features (B, C, h, w) to their c leading principal components (B, c, h, w), strongest first, and back."""

    name = "pca"
    config: PCAConfig
    mean: Tensor  # (C,)
    components: Tensor  # (c, C), orthonormal rows
    variance: Tensor  # (c,): the variance along each component
    total_variance: Tensor  # (): of all C channels
    deviation: Tensor  # (C,): what each channel of the features is divided by; there if the configuration standardises

    def __init__(self, config: PCAConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.latent_channels
        self.register_buffer("mean", torch.zeros(config.input_channels))
        self.register_buffer("components", torch.eye(config.latent_channels, config.input_channels))
        self.register_buffer("variance", torch.ones(config.latent_channels))
        self.register_buffer("total_variance", torch.tensor(float(config.input_channels)))
        if config.standardize:
            self.register_buffer("deviation", torch.ones(config.input_channels))

    @property
    def explained(self) -> float:
        """Share of the (standardised) features' variance that the latents keep, in [0, 1]."""
        return float(self.variance.sum() / self.total_variance)

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """Project onto the components."""
        check_channels(features.shape[1], len(self.mean))
        return torch.einsum("kc,bchw->bkhw", self.components / self._scale(), features - self.mean[:, None, None])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Give the features nearest to the mean that have these latents."""
        return torch.einsum("kc,bkhw->bchw", self.components * self._scale(), latents) + self.mean[:, None, None]

    def _scale(self) -> Tensor:
        """(c, C), or what broadcasts to it: what latent and feature channels are divided by."""
        features = self.deviation if self.config.standardize else torch.ones_like(self.mean)
        if not self.config.whiten:
            return features[None]
        return self.variance.clamp(min=1e-8).sqrt()[:, None] * features


Config, build = PCAConfig, PCA  # what `component.load` takes


def fit_pca(batches: Iterable[Tensor], config: PCAConfig) -> PCA:
    """Fit to features seen once, batch by batch; sums are kept in float64.

    Args:
        batches: features, each (B, C, h, w); every position of every image is one sample.
        config: what to build.
    """
    channels, count, shift = config.input_channels, 0, torch.empty(0)
    total, products = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, channels, dtype=torch.float64)
    for features in batches:
        check_channels(features.shape[1], channels)
        samples = features.movedim(1, -1).flatten(0, -2).cpu().double()  # in this order: not every device knows float64
        if not count:
            # Sums of squares lose digits where the mean is large; about any point near it they do not.
            shift = samples.mean(0)
        samples = samples - shift
        count += len(samples)
        total += samples.sum(0)
        products += samples.T @ samples
    if count < 2:
        raise SFDError(f"PCA needs at least two feature vectors to fit, got {count}; give it more images")
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    deviation = torch.where(deviation > 0, deviation, 1.0)  # a channel that is always the same stays as it is
    if config.standardize:
        covariance = covariance / torch.outer(deviation, deviation)
    variance, vectors = torch.linalg.eigh(covariance)
    leading = vectors.flip(1)[:, : config.latent_channels].T
    # An eigenvector's sign is arbitrary; its largest entry is made positive, so that refitting gives the same.
    signs = leading.gather(1, leading.abs().argmax(1, keepdim=True)).sign()
    pca = PCA(config)
    pca.mean.copy_(mean + shift)
    pca.components.copy_(leading * signs)
    pca.variance.copy_(variance.flip(0)[: config.latent_channels].clamp(min=0))
    pca.total_variance.copy_(covariance.trace())
    if config.standardize:
        pca.deviation.copy_(deviation)
    return pca.eval()
