"""EfficientNet-Lite for inference (Tan and Le 2019, arXiv 1905.11946; Lite: without squeeze-and-excitation, ReLU6).

Batch norms are folded into the convolutions before them, so only weights and biases are left. Inputs are padded as in
TensorFlow: where a strided convolution needs an odd number of pixels, the last side gets one more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

VARIANTS = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2)}  # scale of widths and of depths
STEM, HEAD, CLASSES = 32, 1280, 1000
EPSILON = 1e-3  # of the batch norms


class Stage(NamedTuple):
    """Inverted residual blocks of one width; the first of them has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def stages(variant: str) -> tuple[Stage, ...]:
    """The stages of a variant: widths are multiples of 8; the first and last keep their number of blocks."""
    width, depth = VARIANTS[variant]
    scaled = []
    for number, stage in enumerate(STAGES):
        channels = int(stage.width * width + 4) // 8 * 8
        channels += 8 * (channels < 0.9 * stage.width * width)
        between = 0 < number < len(STAGES) - 1
        blocks = math.ceil(depth * stage.blocks) if between else stage.blocks
        scaled.append(stage._replace(blocks=blocks, width=channels))
    return tuple(scaled)


class Conv(nn.Conv2d):
    """A convolution with a bias, padded as in TensorFlow, and ReLU6 where it is wanted."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True):
        super().__init__(channels, out, kernel, stride, groups=groups)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, ⌈H / stride⌉, ⌈W / stride⌉)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        if height % 2 or width % 2:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
            height = width = 0
        x = F.conv2d(x, self.weight, self.bias, self.stride, (height // 2, width // 2), groups=self.groups)
        return F.relu6(x, inplace=True) if self.relu else x


class Block(nn.Module):
    """Expand, convolve each channel by itself, project; with a shortcut where the shape stays."""

    def __init__(self, channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = channels * stage.expansion
        self.expand = Conv(channels, wide) if stage.expansion > 1 else None
        self.depthwise = Conv(wide, wide, stage.kernel, stride, groups=wide)
        self.project = Conv(wide, stage.width, relu=False)
        self.shortcut = stride == 1 and channels == stage.width

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, stage.width, H / stride, W / stride)."""
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.shortcut else y


class EfficientNetLite(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to features after a number of stages, or to what the classifier sees."""

    def __init__(self, variant: str, depth: int = len(STAGES), *, head: bool = False) -> None:
        """Build the first `depth` stages; `head`: also the classifier of ImageNet's 1000 classes."""
        super().__init__()
        kept = stages(variant)[:depth]
        self.stem = Conv(3, STEM, 3, 2)
        self.blocks = nn.ModuleList()
        for before, stage in pairwise((Stage(0, 0, 0, 0, STEM), *kept)):
            for number in range(stage.blocks):
                channels, stride = (stage.width, 1) if number else (before.width, stage.stride)
                self.blocks.append(Block(channels, stage, stride))
        self.head = Conv(kept[-1].width, HEAD) if head else None
        self.classifier = nn.Linear(HEAD, CLASSES) if head else None

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (B, C, h, w) after the last stage that was built."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return x

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute pooled features (B, 1280) and logits (B, 1000)."""
        assert self.head is not None and self.classifier is not None
        pooled = self.head(self(images)).mean(dim=(2, 3))
        return pooled, self.classifier(pooled)


def folded(published: Mapping[str, Tensor], network: EfficientNetLite) -> dict[str, Tensor]:
    """Take a network's tensors from a state dictionary of the package efficientnet-lite-pytorch, batch norms folded."""
    state = {}
    for name, convolution, norm in _names(network):
        scale = published[f"{norm}.weight"] / (published[f"{norm}.running_var"] + EPSILON).sqrt()
        state[f"{name}.weight"] = published[f"{convolution}.weight"] * scale[:, None, None, None]
        state[f"{name}.bias"] = published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale
    if network.classifier is not None:
        state |= {f"classifier.{part}": published[f"_fc.{part}"] for part in ("weight", "bias")}
    return state


def _names(network: EfficientNetLite) -> Iterator[tuple[str, str, str]]:
    """Give the name of each convolution, and the published names of it and of its batch norm."""
    yield "stem", "_conv_stem", "_bn0"
    for number, block in enumerate(network.blocks):
        parts = [part for part in ("expand", "depthwise", "project") if getattr(block, part) is not None]
        for norm, part in enumerate(parts):
            there = f"_blocks.{number}."
            # A block without expansion has no norm of number 0.
            yield f"blocks.{number}.{part}", f"{there}_{part}_conv", f"{there}_bn{norm + 3 - len(parts)}"
    if network.head is not None:
        yield "head", "_conv_head", "_bn1"
