"""Configuration of the velocity network, its published sizes, and its cost in floating-point operations."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from sfd.latents import CompositeLatent
from sfd.models.layers import TIME_FREQUENCIES
from sfd.utils.config import Settings


class Size(NamedTuple):
    """Depth, width and heads of a transformer."""

    depth: int
    width: int
    heads: int


# All but `tiny`, which is for two CPU cores, are the published ones. Parameters with texture 32 + semantic 16 channels.
SIZES = {
    "tiny": Size(6, 128, 4),  # 1.9 M
    "S": Size(12, 384, 6),  # 39 M
    "B": Size(12, 768, 12),  # 138 M
    "L": Size(24, 1024, 16),  # 466 M
    "XL": Size(28, 1152, 16),  # 683 M
    "XXL": Size(24, 1536, 24),  # 1.04 B, published as "1.0B"
}


class DiTConfig(Settings):
    """The network's architecture."""

    depth: int = Field(gt=0, le=1000)
    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    composite: CompositeLatent
    num_classes: int = Field(ge=0, description="0: unconditional, the null class is the only one")
    prediction: Literal["velocity", "data"] = Field(
        "velocity",
        description="what the heads give; data: x̂1, from which v̂ = (x̂1 − x) / max(1 − t, 0.05) (JiT, 2511.13720)",
    )
    clocks: tuple[str, ...] = Field(
        (), description="all streams, in the order their time embeddings are concatenated; (): one for all"
    )
    repa_block: int | None = Field(None, ge=1, description="1-based block whose tokens REPA aligns; None: no projector")
    repa_width: int = Field(2048, gt=0, description="hidden width of the projector")
    repa_channels: int | None = Field(None, gt=0, description="channels of the encoder features")
    guide_block: int | None = Field(
        None,
        ge=1,
        description="1-based block after which a second head predicts the guiding velocity; None: no second head",
    )
    flow_map: tuple[float, ...] = Field(
        (), description="base times of the finest steps whose mean velocity it predicts (sfd.flow_map); (): velocities"
    )
    checkpointing: bool | Literal["selective"] = Field(
        False,
        description="recompute each block in the backward pass to save memory; selective: not products and attention",
    )

    @model_validator(mode="after")
    def _check(self) -> DiTConfig:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(f"width {self.width} over {self.heads} heads must give each a multiple of 4 channels")
        names = self.composite.names
        if self.clocks and sorted(self.clocks) != sorted(names):
            raise ValueError(
                f"clocks must name each stream ({', '.join(names)}) once, or none; got {', '.join(self.clocks)}"
            )
        if self.width % max(1, len(self.clocks)):
            raise ValueError(
                f"width {self.width} must be a multiple of the number of time embeddings, {len(self.clocks)}"
            )
        if self.repa_block is not None and self.repa_block > self.depth:
            raise ValueError(f"repa_block {self.repa_block} is beyond the last block, {self.depth}")
        if self.guide_block is not None and self.guide_block >= self.depth:
            raise ValueError(f"guide_block {self.guide_block} must be before the last block, {self.depth}")
        if (self.repa_block is None) != (self.repa_channels is None):
            raise ValueError("repa_block and repa_channels must be given together")
        return self


def flops(config: DiTConfig, *, training: bool = False) -> int:
    """Floating-point operations of all matrix products in one forward pass of one image, 2 for each multiply-add.

    Args:
        config: of the network.
        training: with the REPA projector and the second head. A training step costs three times its forward pass.
    """
    width, tokens = config.width, config.composite.token_grid**2
    patches = sum(stream.token_size for stream in config.composite.streams)
    block = (4 * width + 3 * (8 * width // 3)) * width + 2 * tokens * width
    time = TIME_FREQUENCIES * width + width**2 // max(1, len(config.clocks))
    products = tokens * (config.depth * block + 2 * width * patches) + time + (6 * config.depth + 2) * width**2
    if training and config.repa_channels is not None:
        products += tokens * (width + config.repa_width + config.repa_channels) * config.repa_width
    if training and config.guide_block is not None:
        products += (tokens * patches + 2 * width) * width
    return 2 * products
