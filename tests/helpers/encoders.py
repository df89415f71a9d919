"""Encoders without weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Encoder(NamedTuple):
    """Stands for any encoder or compressor: a function with an identity."""

    encode: Callable[[Tensor], Tensor]
    identity: str = "pool"


def pool(size: int) -> Encoder:
    """Average square blocks of pixels: images (B, 3, S, S) to (B, 3, S / size, S / size)."""
    return Encoder(lambda images: F.avg_pool2d(images, size))
