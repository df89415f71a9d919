"""A texture autoencoder that is no `diffusers.AutoencoderKL`, as a diffusers model with the same two calls."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from sfd.encoders import TEXTURE, encoder_module
from sfd.utils.config import parse
from sfd.utils.errors import SFDError


class SFDAutoencoder(ModelMixin, ConfigMixin):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H / f, W / f) and back. Latents are not scaled."""

    @register_to_config
    def __init__(self, encoder: str, settings: dict[str, Any]) -> None:
        """Build with fresh weights.

        Args:
            encoder: the encoder's module in `sfd.encoders`.
            settings: fields of its `Config`.
        """
        super().__init__()
        module = encoder_module(encoder)
        self.net = module.build(parse(module.Config, settings, f"encoder {encoder!r}"))
        if self.net.kind != TEXTURE:
            raise SFDError(f"{encoder} is a {self.net.kind}; a pipeline needs a texture encoder, which also decodes")

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images to a record whose `latent_dist.mode()` is the latents; False: a tuple."""
        mean = self.net.encode(x.to(self.dtype))
        latents = DiagonalGaussianDistribution(torch.cat([mean, torch.zeros_like(mean)], 1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Latents to a record whose `sample` is the images, about [-1, 1]; False: a tuple."""
        images = self.net.decode(z.to(self.dtype))
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Encode and decode."""
        return self.decode(self.net.encode(sample.to(self.dtype)), return_dict)
