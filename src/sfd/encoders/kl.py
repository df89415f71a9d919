"""Published texture autoencoders: `diffusers.AutoencoderKL` with the weights that it was published with.

Latents are the posterior's mean, and are not multiplied by the model's `scaling_factor`: every stream is normalised
with its own data set's statistics, which makes up for any scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sfd.encoders import TEXTURE, _hub, autoencoder_class, check_divisible
from sfd.models.component import Component
from sfd.utils import files
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

WEIGHTS = "diffusion_pytorch_model"
DownBlock = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
UpBlock = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]


class Config(Settings):
    """The architecture, in diffusers' names; the defaults are those of the f16d32 autoencoders, SD-VAE and VA-VAE."""

    kind: ClassVar[str] = TEXTURE
    latent_channels: int = Field(32, ge=1)
    block_out_channels: tuple[int, ...] = Field((128, 128, 256, 256, 512), min_length=1, description="of each level")
    layers_per_block: int = Field(2, ge=1, le=1000, description="residual blocks per level; the decoder has one more")
    down_block_types: tuple[DownBlock, ...] = (*("DownEncoderBlock2D",) * 4, "AttnDownEncoderBlock2D")
    up_block_types: tuple[UpBlock, ...] = ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 4)
    mid_block_add_attention: bool = True
    norm_num_groups: int = Field(32, ge=1)
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @model_validator(mode="after")
    def _check(self) -> Config:
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels or len(self.up_block_types) != levels:
            raise ValueError(f"down_block_types and up_block_types need an entry for each of {levels} levels")
        if any(c < 1 or c % self.norm_num_groups for c in self.block_out_channels):
            raise ValueError(f"block_out_channels must be positive multiples of norm_num_groups {self.norm_num_groups}")
        return self

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.latent_channels

    @property
    def downsample(self) -> int:
        """f: 2 for each level but the first."""
        return 2 ** (len(self.block_out_channels) - 1)


class PublishedAutoencoder(Component):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H / f, W / f) and back."""

    kind = TEXTURE
    name = "kl"
    config: Config

    def __init__(self, config: Config, net: Any = None) -> None:
        super().__init__()
        self.config = config
        self.channels, self.downsample = config.channels, config.downsample
        self.net = autoencoder_class()(**config.model_dump()) if net is None else net

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Give the posterior's mean."""
        check_divisible(images, self.downsample)
        return self.net.encode(images).latent_dist.mean.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode to images, about [-1, 1]."""
        return self.net.decode(latents).sample


build = PublishedAutoencoder

_F8D4 = {
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
# Hub names that can be planned with before they are on this machine.
KNOWN = {"stabilityai/sd-vae-ft-mse": _F8D4, "stabilityai/sd-vae-ft-ema": _F8D4}


def planned(source: str, given: Mapping[str, Any]) -> Config:
    """Learn the architecture of a published autoencoder without its weights; nothing is downloaded.

    Args:
        source: a folder, or a hub name.
        given: fields of `Config` that it is expected to have; if it is not on this machine, they stand for it.
    """
    folder = _hub.local(source)
    if folder is None and source not in KNOWN and not given:
        raise _hub.absent(source)
    found = KNOWN.get(source, {}) if folder is None else _architecture(folder / _hub.CONFIG_FILE)
    return _hub.expected(source, given, found, Config)


def pretrained(source: str, given: Mapping[str, Any]) -> PublishedAutoencoder:
    """Load a published autoencoder (a folder in diffusers' format, or a hub name), in eval mode; see `planned`."""
    folder = _hub.fetch(source, WEIGHTS)
    config = planned(str(folder), given)
    net = _hub.load(autoencoder_class(), folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    return PublishedAutoencoder(config, net).finished()


def _architecture(path: Path) -> dict[str, Any]:
    """Take the fields of `Config` from a diffusers `config.json`."""
    values = files.read_json(path, "autoencoder in the diffusers format")
    if [values.get(name) for name in ("_class_name", "in_channels", "out_channels")] != ["AutoencoderKL", 3, 3]:
        raise SFDError(f"{path} describes no AutoencoderKL of RGB images; give a texture autoencoder of that class")
    # What the first versions of the format left out had the values that are the defaults here.
    needed = ("latent_channels", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types")
    missing = [name for name in needed if name not in values]
    if missing:
        raise SFDError(f"{path} lacks {', '.join(missing)}; restore the file")
    return {name: values[name] for name in Config.model_fields if name in values}
