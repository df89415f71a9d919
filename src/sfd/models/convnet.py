"""A small residual convolutional network: the body of the embedded semantic encoder and of the evaluation classifier.

Pre-activation residual blocks (He et al. 2016, arXiv 1603.05027) with GroupNorm instead of BatchNorm (Wu and He 2018,
arXiv 1803.08494), so that an image's features do not depend on its batch. Channels come first: with them last,
GroupNorm in bf16 on a CPU takes longer than the convolutions save.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

GROUP = 8  # channels normalised together


class ConvNetConfig(Settings):
    """Shape of a `ConvNet`."""

    widths: tuple[int, ...] = Field((32, 64, 128), min_length=1, description="channels of each stage")
    blocks: int = Field(1, ge=1, le=1000, description="residual blocks in each stage")
    stem_stride: int = Field(2, ge=1, description="by which the first convolution shrinks the image")
    image_channels: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _check(self) -> ConvNetConfig:
        if any(w < GROUP or w % GROUP for w in self.widths):
            raise ValueError(f"widths must be positive multiples of {GROUP}, got {self.widths}")
        return self

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return self.widths[-1]

    @property
    def downsample(self) -> int:
        """Image pixels on a side of one output position: the stem's stride, then 2 for each further stage."""
        return self.stem_stride * 2 ** (len(self.widths) - 1)


class ConvNet(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to features (B, config.channels, H / downsample, W / downsample)."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        # One pixel of overlap on every side; at stride 1 the usual 3×3.
        self.stem = nn.Conv2d(config.image_channels, widths[0], config.stem_stride + 2, config.stem_stride, padding=1)
        stages: list[nn.Module] = []
        for stage, width in enumerate(widths):
            for block in range(config.blocks):
                first = stage > 0 and block == 0
                stages.append(_Block(widths[stage - 1] if first else width, width, stride=2 if first else 1))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.GroupNorm(widths[-1] // GROUP, widths[-1])
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features."""
        return self.pyramid(images)[-1]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Compute what leaves every stage, fine to coarse; the last is `forward`'s, the others are not normalised."""
        check_divisible(images, self.config.downsample)
        hidden, levels = self.stem(images), []
        for index, block in enumerate(self.stages, start=1):
            hidden = block(hidden)
            if index % self.config.blocks == 0:
                levels.append(hidden)
        return [*levels[:-1], F.silu(self.norm(hidden))]


class _Block(nn.Module):
    """(B, width_in, h, w) to (B, width, h / stride, w / stride): two 3×3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(width_in // GROUP, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1)
        self.norm2 = nn.GroupNorm(width // GROUP, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        same = width_in == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


def check_divisible(images: Tensor, divisor: int) -> None:
    """Refuse images whose sides are not multiples of `divisor`."""
    height, width = images.shape[-2:]
    if height % divisor or width % divisor:
        raise SFDError(f"images are {height}×{width}, but each side must be a multiple of {divisor} pixels")


def _initialise(module: nn.Module) -> None:
    """He initialisation; the second convolution of a block starts small, so that blocks start near the identity."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # these convolutions all have a bias
    if isinstance(module, _Block):
        with torch.no_grad():
            module.conv2.weight.mul_(math.sqrt(0.1))
