"""DINOv2 ViT-L/14, in whose features FD-DINOv2 is measured (Stein et al. 2023, arXiv 2306.04675).

The features are the class token after the final norm, of images resized to 224 as 8-bit pictures (bicubic, with
antialiasing) and normalised by ImageNet's mean and deviation.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfd.encoders import vit
from sfd.evaluation.extractors._base import Extraction
from sfd.utils.device import full_float32
from sfd.utils.errors import SFDError

NAME = "dinov2"
WEIGHTS = "facebook/dinov2-large"
SIZE = 224


class DINOv2:
    """An `Extractor` of images of any size."""

    name = NAME
    classes: tuple[str, ...] = ()
    accuracy = None
    trained_on = None
    task = "nothing by name: it is self-supervised"

    def __init__(self, encoder: vit.VisionTransformer, device: torch.device) -> None:
        self.identity = f"{NAME}-{encoder.identity}"
        self._encoder, self._device = encoder.to(device), device

    @torch.no_grad()
    def extract(self, images: np.ndarray) -> Extraction:
        """Compute the class token's features of uint8 images (B, S, S, 3)."""
        pixels = (resized(images).to(self._device) - self._encoder.mean) / self._encoder.std
        with full_float32():
            tokens = self._encoder.net(pixel_values=pixels).last_hidden_state
        return Extraction(tokens[:, 0].cpu().numpy(), None)


def resized(images: np.ndarray) -> Tensor:
    """Resize uint8 images (B, S, S, 3) as 8-bit pictures: (B, 3, 224, 224) in [0, 1]."""
    pictures = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


def pretrained(weights: str | None, device: torch.device) -> DINOv2:
    """Load the network from a folder in the transformers format, or by its name on the hub; None: the published one."""
    source = weights or WEIGHTS
    encoder = vit.pretrained(source, {"tile": SIZE, "grid": SIZE // 14})
    if encoder.config.model_type != NAME:
        found = encoder.config.model_type
        raise SFDError(f"--weights {source} is of type {found!r}, but FD-DINOv2 takes {NAME!r}, such as {WEIGHTS}")
    return DINOv2(encoder, device)
