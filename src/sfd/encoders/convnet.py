"""The embedded semantic encoder: a small residual convolutional network, trained here to see shapes and not colours.

It learns from class labels where the data have any and, with or without them, from two differently coloured views of
each image (see `SemanticTask`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from sfd.encoders._base import SEMANTIC, check_divisible
from sfd.models.component import Component
from sfd.models.convnet import ConvNet, ConvNetConfig
from sfd.utils.config import Settings

if TYPE_CHECKING:
    from sfd.data.images import ImageSource
    from sfd.training.tasks.encoders import SemanticTask


class Config(Settings):
    """Shape of the encoder; it shrinks images by stem_stride · 2^(len(widths) − 1)."""

    widths: tuple[int, ...] = Field((16, 32, 96), min_length=1, description="channels of each stage; multiples of 8")
    blocks: int = Field(1, ge=1, le=1000, description="residual blocks a stage")
    stem_stride: int = Field(2, ge=1, description="by which the first convolution shrinks the image")
    channels: int = Field(64, ge=1, description="of the features")

    @property
    def body(self) -> ConvNetConfig:
        """The network below the last linear map."""
        return ConvNetConfig(widths=self.widths, blocks=self.blocks, stem_stride=self.stem_stride)


class Objective(Settings):
    """The training loss: cross-entropy·CE (of labels, if there are any) + VICReg between the two views.

    VICReg (Bardes et al. 2021, arXiv 2105.04906) on the features at equal positions: invariance·mean (a − b)² +
    variance·hinge(1 − std) + covariance·Σ off-diagonal² / channels.
    """

    cross_entropy: float = Field(3.0, ge=0)
    invariance: float = Field(5.0, ge=0)
    variance: float = Field(5.0, ge=0)
    covariance: float = Field(0.2, ge=0)


class ConvNetEncoder(Component):
    """Images (B, 3, H, W) in [-1, 1] to features (B, C, H / f, W / f), of about unit variance once trained."""

    kind = SEMANTIC
    name = "convnet"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.downsample = config.body.downsample
        self.body = ConvNet(config.body)
        self.head = nn.Conv2d(config.body.channels, config.channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features, keeping gradients."""
        return self.head(self.body(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Compute features.

        Raises:
            SFDError: a side is no multiple of `downsample`.
        """
        check_divisible(images, self.downsample)
        return self(images).contiguous()


def build(config: Config) -> ConvNetEncoder:
    """Make the encoder with fresh weights, from torch's global generator (see `sfd.utils.rng.seeded`)."""
    return ConvNetEncoder(config)


def task(
    encoder: ConvNetEncoder, source: ImageSource, objective: Objective, *, seed: int, batch_size: int
) -> SemanticTask:
    """Say how it is trained on `source`."""
    from sfd.training.tasks.encoders import SemanticTask

    return SemanticTask(encoder, source, objective, seed=seed, batch_size=batch_size)
