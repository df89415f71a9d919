"""Published semantic encoders: vision transformers of the transformers library, with their published weights.

An image is cut into square tiles. Each is brought to [0, 1], normalised as the model was trained with, resized
(bicubic, without antialiasing, as in the published runs of this method) so that it has `grid` patches a side, and
encoded by itself. Features are the patch tokens after the final norm; class and register tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from sfd.encoders import _published
from sfd.encoders._base import SEMANTIC, without_torchvision
from sfd.models.component import Component, abbreviate
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError, unknown

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Family(NamedTuple):
    """One of the supported kinds of vision transformer."""

    library_name: str
    """Its classes in transformers are this name followed by Model and Config."""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of the colours, of images in [0, 1]."""
    fields: tuple[str, ...]
    """What its transformers configuration has beside COMMON, of the fields of `Config`."""
    fixed: Mapping[str, Any] = {}
    """Configuration that this use of it decides: no masking, no pooling head."""
    leading: int = 1
    """Tokens before the patches, registers not counted."""


COMMON = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "hidden_act",
    "layer_norm_eps",
)
DINOV2 = ("qkv_bias", "use_swiglu_ffn")
# By the `model_type` in their config.json.
FAMILIES = {
    "dinov2_with_registers": Family("Dinov2WithRegisters", IMAGENET, (*DINOV2, "num_register_tokens")),
    "dinov2": Family("Dinov2", IMAGENET, DINOV2),
    "vit_mae": Family("ViTMAE", IMAGENET, ("intermediate_size", "qkv_bias"), {"mask_ratio": 0.0}),
    "clip_vision_model": Family("CLIPVision", CLIP, ("intermediate_size",)),
    "siglip_vision_model": Family("SiglipVision", HALF, ("intermediate_size",), {"vision_use_head": False}, leading=0),
}
# Models of images and text hold one of the above.
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


class Config(Settings):
    """How images are cut, and the network, in transformers' names; by default DINOv2 ViT-B/14 with registers."""

    tile: int = Field(256, ge=1, description="side of the squares that are encoded by themselves, in pixels")
    grid: int = Field(16, ge=1, description="features a side of a tile, which is resized to grid · patch_size pixels")
    model_type: Literal["dinov2_with_registers", "dinov2", "vit_mae", "clip_vision_model", "siglip_vision_model"] = (
        "dinov2_with_registers"
    )
    hidden_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1, le=1000)
    num_attention_heads: int = Field(12, ge=1)
    intermediate_size: int = Field(3072, ge=1, description="of the MLP; of DINOv2 a multiple of hidden_size")
    patch_size: int = Field(14, ge=1)
    image_size: int = Field(518, ge=1, description="that the position embedding is of; others are interpolated")
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"] = "gelu"
    layer_norm_eps: float = Field(1e-6, gt=0)
    qkv_bias: bool = True
    use_swiglu_ffn: bool = Field(False, description="DINOv2 giant: SwiGLU in place of the MLP")
    num_register_tokens: int = Field(4, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.tile % self.grid:
            raise ValueError(f"a tile of {self.tile} pixels does not divide into {self.grid} features a side")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"width {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if self.model_type.startswith("dinov2") and self.intermediate_size % self.hidden_size:
            raise ValueError(f"intermediate_size {self.intermediate_size} is no multiple of width {self.hidden_size}")
        if self.num_register_tokens and self.model_type != "dinov2_with_registers":
            raise ValueError(f"{self.model_type} has no registers; set num_register_tokens to 0")
        return self


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
        self.channels = config.hidden_size
        self.downsample = config.tile // config.grid
        self.tile = config.tile
        self.family = FAMILIES[config.model_type]
        if net is None:
            network, settings = _network(config)
            net = network(settings)
        self.net = net
        for name, values in zip(("mean", "std"), self.family.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values, device="cpu")[:, None, None], persistent=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode each tile by itself.

        Raises:
            SFDError: a side is no multiple of the tile.
        """
        tile, grid = self.config.tile, self.config.grid
        height, width = images.shape[-2:]
        if height % tile or width % tile:
            raise SFDError(
                f"images of {height}×{width} are no whole number of this encoder's tiles of {tile}×{tile}; choose an "
                "image size that is a multiple, or set `tile` in the encoder's config"
            )
        rows, columns = height // tile, width // tile
        cut = images.unflatten(3, (columns, tile)).unflatten(2, (rows, tile)).permute(0, 2, 4, 1, 3, 5)
        tokens = self._tokens(self.prepare(cut.flatten(0, 2)))  # (B·rows·columns, grid², C)
        features = tokens.unflatten(1, (grid, grid)).unflatten(0, (len(images), rows, columns))
        return features.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).contiguous()

    def prepare(self, tiles: Tensor) -> Tensor:
        """Normalise and resize tiles (B, 3, tile, tile) in [-1, 1], as the network takes them."""
        normalised = ((tiles + 1) / 2 - self.mean) / self.std
        side = self.config.grid * self.config.patch_size
        return F.interpolate(normalised, size=(side, side), mode="bicubic", align_corners=False)

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Give the patch tokens after the final norm, (B, grid², C), rows first."""
        kind = self.config.model_type
        if kind.startswith("dinov2"):
            tokens = self.net(pixel_values=pixels).last_hidden_state
        elif kind == "vit_mae":
            # Masking orders patches by this noise, even if it takes none away: ascending leaves them in their places.
            order = torch.arange(self.config.grid**2, device=pixels.device, dtype=torch.float32)
            noise = order.expand(len(pixels), -1)
            tokens = self.net(pixel_values=pixels, noise=noise, interpolate_pos_encoding=True).last_hidden_state
        else:
            tokens = self.net(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        patches = tokens[:, self.family.leading + self.config.num_register_tokens :]
        # CLIP's own forward pass applies the final norm to the class token alone.
        return self.net.post_layernorm(patches) if kind == "clip_vision_model" else patches


def build(config: Config) -> VisionTransformer:
    """Make the encoder with fresh weights, from torch's global generator (see `sfd.utils.rng.seeded`)."""
    return VisionTransformer(config)


def _network(config: Config) -> tuple[Any, Any]:
    """Give the network's class and its transformers configuration."""
    with without_torchvision():
        import transformers

        family = FAMILIES[config.model_type]
        network = getattr(transformers, f"{family.library_name}Model")
        settings = getattr(transformers, f"{family.library_name}Config")
    values = {name: getattr(config, name) for name in (*COMMON, *family.fields)} | dict(family.fixed)
    if config.model_type.startswith("dinov2"):
        values["mlp_ratio"] = config.intermediate_size // config.hidden_size
    return network, settings(**values)


def architecture(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Take the fields of `Config` from the contents of a transformers `config.json`.

    Raises:
        SFDError: it is not that of a supported model.
    """
    kind = str(values.get("model_type"))
    if kind in TOWERS:
        kind, values = TOWERS[kind], values.get("vision_config") or {}
    if kind not in FAMILIES:
        raise SFDError(f"{where}: {unknown('supported model_type', kind, [*FAMILIES, *TOWERS])}")
    with without_torchvision():
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        library_config = getattr(transformers, f"{FAMILIES[kind].library_name}Config")
    names = (*COMMON, *FAMILIES[kind].fields, *(("mlp_ratio",) if kind.startswith("dinov2") else ()))
    try:
        # Published files leave out what has the library's default.
        full = library_config(**{name: values[name] for name in names if name in values})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise SFDError(f"{where} is damaged: {' '.join(str(error).split())}") from None
    found = {name: getattr(full, name) for name in (*COMMON, *FAMILIES[kind].fields)}
    if kind.startswith("dinov2"):
        found["intermediate_size"] = int(full.hidden_size * full.mlp_ratio)
    return {"model_type": kind, "num_register_tokens": 0, **found}


def _sizes(width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": 4 * width, "num_register_tokens": 0, **others}


_KNOWN = {
    **{
        f"facebook/{kind.replace('_', '-')}-{size}": _sizes(
            *shape, model_type=kind, use_swiglu_ffn=size == "giant", num_register_tokens=registers
        )
        for kind, registers in (("dinov2_with_registers", 4), ("dinov2", 0))
        for size, shape in {
            "small": (384, 12, 6),
            "base": (768, 12, 12),
            "large": (1024, 24, 16),
            "giant": (1536, 40, 24),
        }.items()
    },
    **{
        f"facebook/vit-mae-{size}": _sizes(
            *shape, model_type="vit_mae", patch_size=patch, image_size=224, layer_norm_eps=1e-12
        )
        for size, shape, patch in (
            ("base", (768, 12, 12), 16),
            ("large", (1024, 24, 16), 16),
            ("huge", (1280, 32, 16), 14),
        )
    },
    **{
        f"openai/clip-vit-{size}-patch{patch}": _sizes(
            *shape,
            model_type="clip_vision_model",
            patch_size=patch,
            image_size=224,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )
        for size, shape, patch in (
            ("base", (768, 12, 12), 32),
            ("base", (768, 12, 12), 16),
            ("large", (1024, 24, 16), 14),
        )
    },
    **{
        f"google/siglip-base-patch16-{side}": _sizes(
            768,
            12,
            12,
            model_type="siglip_vision_model",
            patch_size=16,
            image_size=side,
            hidden_act="gelu_pytorch_tanh",
        )
        for side in (224, 256, 384, 512)
    },
}
FORMAT = _published.Format(
    library="transformers",
    weights="model",
    architecture=architecture,
    known=_KNOWN,
    choices=("tile", "grid"),
)


def planned(source: str, given: Mapping[str, Any]) -> Config:
    """Learn the architecture of a published encoder without its weights (see `_published.planned`)."""
    return _published.planned(source, given, Config, FORMAT)


def pretrained(source: str, given: Mapping[str, Any]) -> VisionTransformer:
    """Load a published encoder, in eval mode, without gradients, on the CPU.

    Args:
        source: a folder with `config.json` and `model.safetensors`, or a hub name.
        given: `tile` and `grid`, and fields of `Config` that the network is expected to have.

    Raises:
        SFDError: it cannot be had, is another than expected, or its files are damaged.
    """
    folder = _published.fetched(source, FORMAT)
    config = planned(str(folder), given)
    return VisionTransformer(config, _load(folder, config)).eval().requires_grad_(False)


def _load(folder: Path, config: Config) -> Any:
    """Load the network; the library translates the tensors' published names."""
    from safetensors import SafetensorError

    network, settings = _network(config)
    options = {"use_safetensors": True, "local_files_only": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            net, report = network.from_pretrained(
                str(folder), config=settings, dtype=torch.float32, output_loading_info=True, **options
            )
    except SafetensorError as error:
        raise SFDError(f"{folder} has no intact safetensors weights ({error}); make or fetch them again") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise SFDError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    # Text towers, decoders and heads may be left over, but nothing of the network itself.
    own = {name for name, _ in net.named_children()}
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(name for name in report["unexpected_keys"] if name.partition(".")[0] in own),
        "misshapen": sorted(name for name, *_ in report["mismatched_keys"]),
    }
    differences = "; ".join(f"{label}: {abbreviate(names)}" for label, names in problems.items() if names)
    if differences:
        raise SFDError(f"{folder}: the weights do not fit config.json ({differences}); use the files of one model")
    return net


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and reports away: what they would say becomes an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
