"""Published semantic encoders: DINOv2, with and without registers, of the transformers library.

An image is cut into square tiles. Each is brought to [0, 1], normalised as the model was trained with, resized
(bicubic, without antialiasing, as in the published runs of this method) so that it has `grid` patches per side, and
encoded separately. Features are the patch tokens after the final norm; class and register tokens are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from sfd.encoders import SEMANTIC, _hub, check_divisible
from sfd.models.component import Component
from sfd.utils import files
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError, unknown

WEIGHTS = "model"
REGISTERS = "dinov2_with_registers"
MODEL_TYPES = ("dinov2", REGISTERS)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of the colours
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}


class Config(Settings):
    """How images are cut, and the network, in transformers' names; by default DINOv2 ViT-B/14 with registers."""

    kind: ClassVar[str] = SEMANTIC
    tile: int = Field(256, ge=1, description="side of the tiles that are encoded separately, in pixels")
    grid: int = Field(16, ge=1, description="features per side of a tile, which is resized to grid · patch_size pixels")
    model_type: Literal["dinov2_with_registers", "dinov2"] = "dinov2_with_registers"
    hidden_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1, le=1000)
    num_attention_heads: int = Field(12, ge=1)
    mlp_ratio: int = Field(4, ge=1)
    patch_size: int = Field(14, ge=1)
    image_size: int = Field(518, ge=1, description="that the position embedding is of; others are interpolated")
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"] = "gelu"
    layer_norm_eps: float = Field(1e-6, gt=0)
    qkv_bias: bool = True
    use_swiglu_ffn: bool = Field(False, description="DINOv2 giant: SwiGLU instead of the MLP")
    num_register_tokens: int = Field(4, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.tile % self.grid:
            raise ValueError(f"a tile of {self.tile} pixels does not divide into {self.grid} features per side")
        if self.num_register_tokens and self.model_type != REGISTERS:
            raise ValueError(f"{self.model_type} has no registers; set num_register_tokens to 0")
        return self

    @property
    def channels(self) -> int:
        """C of the features."""
        return self.hidden_size

    @property
    def downsample(self) -> int:
        """f: image pixels per side of one feature."""
        return self.tile // self.grid


NETWORK = tuple(name for name in Config.model_fields if name not in ("tile", "grid"))  # fields that the model decides


class VisionTransformer(Component):
    """Images (B, 3, H, W) in [-1, 1] to features (B, C, H / f, W / f)."""

    kind = SEMANTIC
    name = "vit"
    config: Config
    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    def __init__(self, config: Config, net: Any = None) -> None:
        super().__init__()
        self.config = config
        self.channels, self.downsample = config.channels, config.downsample
        self.net = _network(config) if net is None else net
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values, device="cpu")[:, None, None], persistent=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode each tile separately."""
        tile, grid = self.config.tile, self.config.grid
        check_divisible(images, tile)
        rows, columns = images.shape[2] // tile, images.shape[3] // tile
        cut = images.unflatten(3, (columns, tile)).unflatten(2, (rows, tile)).permute(0, 2, 4, 1, 3, 5)
        tokens = self.net(pixel_values=self.prepare(cut.flatten(0, 2))).last_hidden_state
        patches = tokens[:, 1 + self.config.num_register_tokens :]  # (B·rows·columns, grid², C)
        features = patches.unflatten(1, (grid, grid)).unflatten(0, (len(images), rows, columns))
        return features.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).contiguous()

    def prepare(self, tiles: Tensor) -> Tensor:
        """Normalise and resize tiles (B, 3, tile, tile) in [-1, 1], as the network takes them."""
        normalised = ((tiles + 1) / 2 - self.mean) / self.std
        side = self.config.grid * self.config.patch_size
        return F.interpolate(normalised, size=(side, side), mode="bicubic", align_corners=False)


build = VisionTransformer


def planned(source: str, given: Mapping[str, Any]) -> Config:
    """Learn the architecture of a published encoder without its weights; nothing is downloaded.

    Args:
        source: a folder with a transformers `config.json`, or a hub name.
        given: `tile` and `grid`, and fields of `Config` that the network is expected to have; if it is not on this
            machine, they stand for it.
    """
    folder = _hub.local(source)
    known = re.fullmatch(r"facebook/(dinov2(?:-with-registers)?)-(\w+)", source)
    found: dict[str, Any] = {}
    if folder is not None:
        found = _architecture(folder)
    elif known and known[2] in SIZES:
        width, depth, heads = SIZES[known[2]]
        found = {
            "model_type": known[1].replace("-", "_"),
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_register_tokens": 4 if known[1].endswith("registers") else 0,
            "use_swiglu_ffn": known[2] == "giant",
        }
    elif "hidden_size" not in given:
        raise _hub.absent(source)
    return _hub.expected(source, given, found, Config)


def pretrained(source: str, given: Mapping[str, Any]) -> VisionTransformer:
    """Load a published encoder (a folder in transformers' format, or a hub name), in eval mode; see `planned`."""
    folder = _hub.fetch(source, WEIGHTS)
    config = planned(str(folder), given)
    from transformers import AutoModel

    net = _hub.load(AutoModel, folder, dtype=torch.float32)
    return VisionTransformer(config, net).finished()


def _network(config: Config) -> Any:
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(**config.model_dump(include=set(NETWORK))))


def _architecture(folder: Path) -> dict[str, Any]:
    """Take the fields of `Config` from a transformers `config.json`, which leaves out the library's defaults."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / _hub.CONFIG_FILE
    kind = str(files.read_json(path, "model in the transformers format").get("model_type"))
    if kind not in MODEL_TYPES:
        raise SFDError(f"{path}: {unknown('supported model_type', kind, MODEL_TYPES)}")
    try:
        full = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise SFDError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    return {"num_register_tokens": 0, **{name: getattr(full, name) for name in NETWORK if hasattr(full, name)}}
