"""Inception v3 as FID was defined with it: the network of 2015-12-05, ported from TensorFlow by torch-fidelity.

ADM's evaluation (Dhariwal and Nichol 2021, arXiv 2105.05233) takes from one pass: the pooled features (`pool_3`) for
FID, precision and recall; the first 7 channels of `mixed_6/conv`, which is the first branch of the port's `Mixed_6d`,
for sFID; and the class probabilities without the last layer's bias for the inception score. Images of any size are
resized to 299 bilinearly, without antialiasing, as TensorFlow 1 did.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfd.evaluation.extractors._base import Extraction
from sfd.utils import files
from sfd.utils.device import full_float32
from sfd.utils.errors import SFDError

NAME = "inception"
FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL = SPATIAL_CHANNELS * 17 * 17
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
CHECKSUM = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # SHA-256 of the published file


class Inception:
    """An `Extractor` of images of any size."""

    name = NAME
    classes: tuple[str, ...] = ()
    accuracy = None
    trained_on = None
    task = "1008 classes of ImageNet 2012"

    def __init__(self, network: nn.Module, checksum: str, device: torch.device) -> None:
        self.checksum = checksum  # SHA-256 of the weights' file
        self.identity = f"{NAME}-{checksum[:16]}"
        self._network = network.eval().to(device)
        self._device = device
        self._spatial: Tensor | None = None
        self._network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        # ADM's stored moments count rows first, then columns, then channels.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def extract(self, images: np.ndarray) -> Extraction:
        """Compute pooled and spatial features, and probabilities, of uint8 images (B, S, S, 3)."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(self._device)
        with full_float32():
            features, logits = self._network(pixels)
        spatial, self._spatial = self._spatial, None
        assert spatial is not None
        return Extraction(features.cpu().numpy(), logits.softmax(dim=1).cpu().numpy(), spatial.cpu().numpy())


def pretrained(weights: str | None, device: torch.device) -> Inception:
    """Build the network with weights from a file; None: the published ones, fetched once."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # torchvision beside another build of PyTorch fails with the latter
        raise SFDError(
            f"the extractor 'inception' needs torch-fidelity, which cannot be imported ({error}); "
            "install it, and the torchvision of your PyTorch, with: pip install torch-fidelity torchvision"
        ) from None
    path = Path(weights) if weights else _fetched(URL_INCEPTION_V3)
    if not path.is_file():
        raise SFDError(f"there is no file {path}; give {WEIGHTS}, which torch-fidelity publishes")
    buffer = io.BytesIO()
    torch.save(files.read_pickled(path), buffer)  # the constructor unpickles it, so it gets what was read safely
    buffer.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
        )
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise SFDError(f"{path} holds the weights of another network ({reason}); give {WEIGHTS}") from None
    return Inception(network, files.checksum(path), device)


def _fetched(url: str) -> Path:
    """Find the published weights where PyTorch keeps such files; fetch them if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=CHECKSUM)
        except (OSError, RuntimeError) as error:
            raise SFDError(f"{url} cannot be fetched ({error}); fetch it elsewhere and give --weights FILE") from None
    return path
