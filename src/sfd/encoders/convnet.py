"""The embedded semantic encoder: a small residual convolutional network, trained to see shapes rather than colours.

It learns from class labels where the data have any and, with or without them, from two differently coloured views of
each image (see `sfd.training.tasks.semantic`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sfd.encoders import SEMANTIC
from sfd.models.component import Component
from sfd.models.convnet import ConvNet, ConvNetConfig
from sfd.utils.config import Settings


class Config(Settings):
    """Shape of the encoder; it shrinks images by stem_stride · 2^(len(widths) − 1)."""

    kind: ClassVar[str] = SEMANTIC
    widths: tuple[int, ...] = Field((16, 32, 96), min_length=1, description="channels of each stage; multiples of 8")
    blocks: int = Field(1, ge=1, le=1000, description="residual blocks per stage")
    stem_stride: int = Field(2, ge=1, description="by which the first convolution shrinks the image")
    channels: int = Field(64, ge=1, description="of the features")

    @property
    def body(self) -> ConvNetConfig:
        """The network below the last linear map."""
        return ConvNetConfig(widths=self.widths, blocks=self.blocks, stem_stride=self.stem_stride)

    @property
    def downsample(self) -> int:
        """f: image pixels on a side of one feature."""
        return self.body.downsample


class ConvNetEncoder(Component):
    """Images (B, 3, H, W) in [-1, 1] to features (B, C, H / f, W / f), of about unit variance once trained."""

    kind = SEMANTIC
    name = "convnet"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.downsample = config.channels, config.downsample
        self.body = ConvNet(config.body)
        self.head = nn.Conv2d(config.body.channels, config.channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features, keeping gradients."""
        return self.head(self.body(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Compute features."""
        return self(images).contiguous()


build = ConvNetEncoder
