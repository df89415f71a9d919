"""Composite latents: an ordered set of named streams that one network denoises together.

A composite latent travels packed, (B, N): the streams one after another, each flattened from (channels, grid, grid).
Unpacking gives views, so packing costs nothing and solvers see one tensor. Where all grids agree, packed order is that
of channels stacked in stream order, which is how the published latents are stored (texture first).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from sfd.utils.config import Settings
from sfd.utils.device import to_device
from sfd.utils.errors import SFDError

TEXTURE, SEMANTIC = "texture", "semantic"
"""Names of the method's two streams; pixels are decoded from the texture stream alone."""


class Stream(Settings):
    """One named part of a composite latent."""

    name: str
    channels: int = Field(gt=0)
    grid: int = Field(gt=0, description="rows and columns of the latent")
    patch_size: int = Field(1, gt=0, description="latent rows and columns in one token")
    weight: float = Field(1.0, ge=0, description="of its channels in the velocity loss")
    mean: tuple[float, ...] = Field((), description="per channel over the data set; empty: not normalised")
    std: tuple[float, ...] = Field((), description="per channel over the data set; empty: not normalised")
    tokenizer: str = Field("", description="identity of the encoder that made the latents; empty: unknown")

    @model_validator(mode="after")
    def _check(self) -> Stream:
        if self.grid % self.patch_size:
            raise ValueError(
                f"stream {self.name!r}: grid {self.grid} is not a multiple of patch_size {self.patch_size}"
            )
        for label, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != self.channels:
                raise ValueError(f"stream {self.name!r}: {label} has {len(values)} values for {self.channels} channels")
        if bool(self.mean) != bool(self.std):
            raise ValueError(f"stream {self.name!r}: mean and std must be given together")
        if any(not s > 0 for s in self.std):
            raise ValueError(f"stream {self.name!r}: every std must be positive")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, grid, grid) of one latent."""
        return (self.channels, self.grid, self.grid)

    @property
    def size(self) -> int:
        """Number of entries in one latent."""
        return self.channels * self.grid**2

    @property
    def token_size(self) -> int:
        """Number of entries in one token."""
        return self.channels * self.patch_size**2

    @property
    def token_grid(self) -> int:
        """Rows and columns of tokens."""
        return self.grid // self.patch_size

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (channels, 1, 1) each, in the dtype and on the device of `like`."""
        values = torch.tensor([self.mean or [0.0], self.std or [1.0]], dtype=like.dtype)
        mean, std = to_device(values[:, :, None, None], like.device)
        return mean, std


class CompositeLatent(Settings):
    """The streams of a composite latent, in packed order."""

    streams: tuple[Stream, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> CompositeLatent:
        if len(set(self.names)) != len(self.streams):
            raise ValueError(f"stream names must differ, got {', '.join(self.names)}")
        grids = {s.name: s.token_grid for s in self.streams}
        if len(set(grids.values())) > 1:
            raise ValueError(f"all streams must share one token grid (grid / patch_size), got {grids}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Stream names in packed order."""
        return tuple(s.name for s in self.streams)

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each stream in one latent."""
        return [s.size for s in self.streams]

    @property
    def size(self) -> int:
        """N: number of entries in one packed latent."""
        return sum(self.sizes)

    @property
    def token_grid(self) -> int:
        """Rows and columns of the shared token grid."""
        return self.streams[0].token_grid

    def __getitem__(self, name: str) -> Stream:
        """Look a stream up by name."""
        return self.streams[self.index(name)]

    def index(self, name: str) -> int:
        """Place of a stream in packed order."""
        if name not in self.names:
            raise SFDError(f"there is no stream {name!r} in this composite latent (it has {', '.join(self.names)})")
        return self.names.index(name)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Split (B, N) into views (B, channels, grid, grid), one per stream."""
        parts = packed.split(self.sizes, dim=1)
        return {s.name: part.unflatten(1, s.shape) for s, part in zip(self.streams, parts, strict=True)}

    def pack(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Join (B, channels, grid, grid) of each stream into (B, N); the inverse of `unpack`."""
        for s in self.streams:
            given = tuple(latents[s.name].shape[1:]) if s.name in latents else None
            if given != s.shape:
                raise SFDError(f"stream {s.name!r}: expected latents of shape {s.shape}, got {given}")
        return torch.cat([latents[s.name].flatten(1) for s in self.streams], dim=1)

    def per_entry(self, values: Tensor) -> Tensor:
        """Repeat one value per stream, (…, K), over that stream's entries: (…, N)."""
        # Views, not `repeat_interleave`: with sizes in a device tensor it would synchronise.
        each = zip(values.unbind(-1), self.sizes, strict=True)
        return torch.cat([value[..., None].expand(*value.shape, size) for value, size in each], dim=-1)

    def per_position(self, packed: Tensor) -> Tensor:
        """Rearrange (B, N) by position: (B, ΣC, P), the channels of all streams at each of P positions.

        Where all grids agree, positions are the latents' own. Otherwise every stream is folded, space to depth, onto
        the coarsest grid that they share, the greatest common divisor of their grids.
        """
        grid = math.gcd(*(s.grid for s in self.streams))
        if all(s.grid == grid for s in self.streams):
            return packed.unflatten(1, (-1, grid**2))
        latents = self.unpack(packed)
        folded = [pixel_unshuffle(latents[s.name], s.grid // grid) for s in self.streams]
        return torch.cat(folded, dim=1).flatten(2)

    def normalize(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standardise each stream per channel with the data set's statistics."""
        normal = {}
        for s in self.streams:
            mean, std = s.statistics(latents[s.name])
            normal[s.name] = (latents[s.name] - mean) / std
        return normal

    def denormalize(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `normalize`."""
        raw = {}
        for s in self.streams:
            mean, std = s.statistics(latents[s.name])
            raw[s.name] = latents[s.name] * std + mean
        return raw
