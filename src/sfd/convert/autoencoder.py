"""Texture autoencoders in the LDM checkpoint format, as `diffusers.AutoencoderKL`.

Both are the same network (Rombach et al. 2022). There, attention is made of 1×1 convolutions and the decoder's levels
are counted from the image; in diffusers they are linear layers, counted in the order that they run in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfd.encoders import autoencoder_class
from sfd.models.component import assemble
from sfd.utils.errors import SFDError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WHAT = "LDM autoencoder"
GROUPS = 32  # of channels normalised together, in every LDM autoencoder
# What only the training of an LDM autoencoder needs: losses with their discriminator, the averaged copy's bookkeeping,
# and the vision encoder with the projection that VA-VAE aligns its latents with.
TRAINING_ONLY = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")
# LDM → diffusers, within a name; what is in neither list is called the same.
_RULES = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
    (r"\.norm_out\.", r".conv_norm_out."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def inferred_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read the arguments of `AutoencoderKL` from the shapes of an LDM checkpoint's tensors.

    `sample_size`, which only tiling uses, stays at diffusers' default, and `scaling_factor` is 1, because latents are
    normalised by their statistics here.
    """
    levels = range(len({name.split(".")[2] for name in shapes if name.startswith("encoder.down.")}))
    blocks = len({name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")})
    attention = [f"encoder.down.{i}.attn.0.norm.weight" in shapes for i in levels]
    try:
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels],
            "layers_per_block": blocks,
            "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
            "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
            "norm_num_groups": GROUPS,
            "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in shapes,
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
            "scaling_factor": 1.0,
        }
    except (KeyError, IndexError) as missing:
        raise SFDError(f"this is not a valid {WHAT}: it lacks the tensor {missing}") from None


def from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> AutoencoderKL:
    """Build the autoencoder with the tensors of an LDM checkpoint, those that only training needs left out."""
    try:
        return assemble(lambda: autoencoder_class()(**config), renamed(state, len(config["block_out_channels"])), WHAT)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:  # channels that do not divide into 32 groups
        raise SFDError(f"there is no {WHAT} of these shapes: {error}") from None


def renamed(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Give an LDM checkpoint's tensors their names and shapes in diffusers; those of training alone are left out."""
    ours = {}
    for published, tensor in state.items():
        if published.startswith(TRAINING_ONLY):
            continue
        name = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", published)
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        linear = ".attentions." in name and tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
        ours[name] = tensor.flatten(1) if linear else tensor
    return ours
