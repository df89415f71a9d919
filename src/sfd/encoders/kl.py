"""Published texture autoencoders: `diffusers.AutoencoderKL` as it is, with the weights that it was published with.

Latents are the posterior's mean, and are not multiplied by the model's `scaling_factor`: every stream is normalised
with its own data set's statistics, which makes up for any scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sfd.encoders import _published
from sfd.encoders._base import TEXTURE, autoencoder, check_divisible
from sfd.models.component import Component, assemble
from sfd.utils import files
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

DownBlock = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
UpBlock = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]


class Config(Settings):
    """The architecture, in diffusers' names; the defaults are those of the f16d32 autoencoders, SD-VAE and VA-VAE.

    It shrinks images by 2^(len(block_out_channels) − 1).
    """

    latent_channels: int = Field(32, ge=1)
    block_out_channels: tuple[int, ...] = Field((128, 128, 256, 256, 512), min_length=1, description="of each level")
    layers_per_block: int = Field(2, ge=1, le=1000, description="residual blocks a level; the decoder has one more")
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
            raise ValueError(
                f"block_out_channels has {levels} levels, so down_block_types and up_block_types need {levels} entries "
                f"each, but have {len(self.down_block_types)} and {len(self.up_block_types)}"
            )
        if any(c < 1 or c % self.norm_num_groups for c in self.block_out_channels):
            raise ValueError(
                f"block_out_channels must be positive multiples of norm_num_groups = {self.norm_num_groups}, "
                f"got {self.block_out_channels}"
            )
        return self


class PublishedAutoencoder(Component):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H / f, W / f) and back."""

    kind = TEXTURE
    name = "kl"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels = config.latent_channels
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        self.net = autoencoder(**config.model_dump())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Give the posterior's mean.

        Raises:
            SFDError: a side is no multiple of `downsample`.
        """
        check_divisible(images, self.downsample)
        return self.net.encode(images).latent_dist.mean.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode to images, about [-1, 1]."""
        return self.net.decode(latents).sample


def build(config: Config) -> PublishedAutoencoder:
    """Make the autoencoder with fresh weights, from torch's global generator (see `sfd.utils.rng.seeded`)."""
    return PublishedAutoencoder(config)


def architecture(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Take the fields of `Config` from the contents of a diffusers `config.json`.

    Raises:
        SFDError: it is not that of an `AutoencoderKL` of RGB images.
    """
    if values.get("_class_name") != "AutoencoderKL":
        found = values.get("_class_name", "no _class_name")
        raise SFDError(f"{where} describes no AutoencoderKL but {found}; give a texture autoencoder of that class")
    if (values.get("in_channels"), values.get("out_channels")) != (3, 3):
        raise SFDError(f"{where}: only autoencoders of 3 channels in and out are supported; give one of RGB images")
    # What the first versions of the format left out had then the values that are the defaults here.
    needed = ("latent_channels", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types")
    missing = [name for name in needed if name not in values]
    if missing:
        raise SFDError(f"{where} lacks {', '.join(missing)}; restore the file")
    return {name: values[name] for name in Config.model_fields if name in values}


_F8D4 = {
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
FORMAT = _published.Format(
    library="diffusers",
    weights="diffusion_pytorch_model",
    architecture=architecture,
    known={"stabilityai/sd-vae-ft-mse": _F8D4, "stabilityai/sd-vae-ft-ema": _F8D4},
)

# Attention's linear maps were once named otherwise, in files that are still in use.
_FORMER_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def planned(source: str, given: Mapping[str, Any]) -> Config:
    """Learn the architecture of a published autoencoder without its weights (see `_published.planned`)."""
    return _published.planned(source, given, Config, FORMAT)


def pretrained(source: str, given: Mapping[str, Any]) -> PublishedAutoencoder:
    """Load a published autoencoder, in eval mode, without gradients, on the CPU.

    Args:
        source: a folder with `config.json` and `diffusion_pytorch_model.safetensors`, or a hub name.
        given: fields of `Config` that it is expected to have.

    Raises:
        SFDError: it cannot be had, is another than expected, or its files are damaged.
    """
    folder = _published.fetched(source, FORMAT)
    config = planned(str(folder), given)
    read = files.read_tensors(folder / f"{FORMAT.weights}.safetensors")
    tensors = {_present_name(name): tensor for name, tensor in read.items()}
    return assemble(lambda: build(config), {f"net.{name}": t for name, t in tensors.items()}, source)


def _present_name(name: str) -> str:
    for former, present in _FORMER_NAMES.items():
        name = name.replace(former, present)
    return name
