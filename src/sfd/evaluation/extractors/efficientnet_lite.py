"""EfficientNet-Lite1, for a Fréchet distance in ImageNet features without the Hugging Face hub.

The features are those that the classifier sees (1280), of images resized to 128 pixels (bicubic). Not comparable with a
published FID, which takes Inception's. The encoder of a run is Lite0, so that a run is not judged by its own encoder.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from sfd.data.images import to_tensor
from sfd.encoders.efficientnet_lite import load_published
from sfd.evaluation.extractors._base import Extraction
from sfd.models.component import fingerprint
from sfd.models.efficientnet_lite import EfficientNetLite
from sfd.utils.device import full_float32

NAME = "efficientnet_lite"
VARIANT = "lite1"
SIZE = 128


class EfficientNetLiteExtractor:
    """An `Extractor` of images of any size."""

    name = NAME
    classes: tuple[str, ...] = ()
    accuracy = None
    trained_on = None
    task = "1000 classes of ImageNet 2012"

    def __init__(self, network: EfficientNetLite, device: torch.device) -> None:
        self.identity = f"{NAME}-{fingerprint([VARIANT, SIZE], network)}"
        self._network, self._device = network.to(device), device

    @torch.no_grad()
    def extract(self, images: np.ndarray) -> Extraction:
        """Compute pooled features and probabilities of uint8 images (B, S, S, 3)."""
        pixels = to_tensor(images).to(self._device)
        resized = F.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True)
        with full_float32():
            features, logits = self._network.classify(resized.contiguous(memory_format=torch.channels_last))
        return Extraction(features.cpu().numpy(), logits.softmax(dim=1).cpu().numpy())


def pretrained(weights: str | None, device: torch.device) -> EfficientNetLiteExtractor:
    """Load the network from the file of its published weights; None: from the package that holds them."""
    network = EfficientNetLite(VARIANT, head=True)
    load_published(network, weights or VARIANT)
    return EfficientNetLiteExtractor(network.eval().requires_grad_(False), device)
