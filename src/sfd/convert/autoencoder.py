"""Texture autoencoders in the LDM checkpoint format: names and shapes to those of `diffusers.AutoencoderKL` and back.

Both are the same network (Rombach et al. 2022). There, attention is made of 1×1 convolutions and the decoder's levels
are counted from the image; in diffusers they are linear layers, counted in the order that they run in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfd.encoders._base import autoencoder
from sfd.models.component import require_match, shapes
from sfd.utils import files
from sfd.utils.errors import SFDError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WHAT = "LDM autoencoder"
GROUPS = 32  # of channels normalised together, in every LDM autoencoder
# What only the training of an LDM autoencoder needs: losses with their discriminator, the averaged copy's bookkeeping,
# and the vision encoder with the projection that VA-VAE aligns its latents with.
TRAINING_ONLY = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")
# diffusers → LDM, within a name; what is in neither list is called the same.
_RULES = (
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.down_blocks\.(\d+)\.attentions\.", r"encoder.down.\1.attn."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1.block."),
    (r"^decoder\.up_blocks\.(\d+)\.attentions\.", r"decoder.up.\1.attn."),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
    (r"\.conv_norm_out\.", r".norm_out."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.group_norm\.", r".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", r".proj_out."),
)
_ATTENTION_WEIGHT = re.compile(r"\.(q|k|v|proj_out)\.weight$")


def inferred_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read the arguments of `AutoencoderKL` from the shapes of an LDM checkpoint's tensors.

    `sample_size`, which only tiling uses, stays at diffusers' default, and `scaling_factor` is 1, because latents are
    normalised by their statistics here.

    Raises:
        SFDError: a tensor that tells a size is missing.
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
        raise SFDError(f"this is no {WHAT}: it lacks the tensor {missing}") from None


def split_training_only(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Part what the autoencoder is made of from the names of what only its training needed."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}
    return kept, sorted(state.keys() - kept.keys())


def published_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the LDM checkpoint of this autoencoder."""
    ours = shapes(build(config, "meta"))
    named = {_published_name(name, len(config["block_out_channels"])): shape for name, shape in ours.items()}
    return {name: shape + (1, 1) * _is_convolution(name, len(shape)) for name, shape in named.items()}


def from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> AutoencoderKL:
    """Build the autoencoder with the tensors of an LDM checkpoint.

    Raises:
        SFDError: a tensor is missing, unknown or misshapen.
    """
    require_match(state, published_shapes(config), WHAT)
    network = build(config)
    levels = len(config["block_out_channels"])
    ours = {name: state[_published_name(name, levels)].reshape(t.shape) for name, t in network.state_dict().items()}
    network.load_state_dict(ours)
    return network.eval().requires_grad_(False)


def to_published(network: AutoencoderKL) -> dict[str, Tensor]:
    """Give the tensors under their LDM names, in their LDM shapes.

    Raises:
        SFDError: no LDM checkpoint can hold this autoencoder.
    """
    levels = len(network.config.block_out_channels)
    named = {_published_name(name, levels): tensor for name, tensor in network.state_dict().items()}
    state = {name: t[..., None, None] if _is_convolution(name, t.dim()) else t for name, t in named.items()}
    implied = inferred_config({name: tuple(t.shape) for name, t in state.items()})
    for field, value in {**implied, "act_fn": "silu", "scaling_factor": None}.items():
        given = files.jsonable(network.config[field])
        if value is not None and given != value:
            raise SFDError(f"the LDM format has no place for an autoencoder with {field} = {given}; it implies {value}")
    return state


def build(config: Mapping[str, Any], device: str = "cpu") -> AutoencoderKL:
    """Make the autoencoder with arbitrary weights.

    Raises:
        SFDError: there is no such autoencoder; channels that do not divide into 32 groups, for one.
    """
    try:
        with torch.device(device):
            return autoencoder(**config)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise SFDError(f"there is no {WHAT} of these shapes: {error}") from None


def _published_name(name: str, levels: int) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)


def _is_convolution(name: str, dimensions: int) -> bool:
    """Whether this linear layer's weight is a 1×1 convolution's in the LDM format."""
    return dimensions == 2 and _ATTENTION_WEIGHT.search(name) is not None
