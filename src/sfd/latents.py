"""Composite latents: an ordered set of named streams that one network denoises together.

A composite latent travels packed, (B, N): the streams one after another, each flattened from (channels, grid, grid).
Splitting gives views, so packing costs nothing and solvers see one tensor. Where all grids agree, packed order is that
of channels stacked in stream order, which is how the published latents are stored (texture first).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from sfd.utils.config import Settings
from sfd.utils.errors import SFDError
from sfd.utils.transfer import sent


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
    def token_grid(self) -> int:
        """Rows and columns of tokens."""
        return self.grid // self.patch_size


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

    @cached_property
    def size(self) -> int:
        """N: number of entries in one packed latent."""
        return sum(s.size for s in self.streams)

    @property
    def token_grid(self) -> int:
        """Rows and columns of the shared token grid."""
        return self.streams[0].token_grid

    def __getitem__(self, name: str) -> Stream:
        """Look a stream up by name."""
        return self.streams[self.index(name)]

    def index(self, name: str) -> int:
        """Give the place of a stream in packed order.

        Raises:
            SFDError: there is no such stream.
        """
        if name not in self.names:
            raise SFDError(f"there is no stream {name!r} in this composite latent (it has {', '.join(self.names)})")
        return self.names.index(name)

    def split(self, packed: Tensor) -> dict[str, Tensor]:
        """Unpack (B, N) into views (B, channels, grid, grid), one a stream."""
        parts = packed.split([s.size for s in self.streams], dim=1)
        return {s.name: part.unflatten(1, s.shape) for s, part in zip(self.streams, parts, strict=True)}

    def join(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Pack one (B, channels, grid, grid) a stream into (B, N); the inverse of `split`.

        Raises:
            SFDError: a stream is missing, or its latent has another shape than declared.
        """
        for s in self.streams:
            given = tuple(latents[s.name].shape[1:]) if s.name in latents else None
            if given != s.shape:
                raise SFDError(f"stream {s.name!r}: expected latents of shape {s.shape}, got {given}")
        return torch.cat([latents[s.name].flatten(1) for s in self.streams], dim=1)

    def expand(self, values: Tensor) -> Tensor:
        """Repeat one value a stream, (…, K), over that stream's entries: (…, N)."""
        # Views, not `repeat_interleave`: its sizes would be a tensor on the device, which a GPU is waited for to get.
        each = zip(values.unbind(-1), self.streams, strict=True)
        return torch.cat([value[..., None].expand(*value.shape, s.size) for value, s in each], dim=-1)

    def positions(self, packed: Tensor) -> Tensor:
        """Line up the entries of (B, N) by place: (B, ΣC, P), the channels of all streams at each of P positions.

        Where all grids agree, positions are the latents' own. Otherwise every stream is folded, space to depth, onto
        the coarsest grid that they share, the greatest common divisor of their grids.
        """
        grid = math.gcd(*(s.grid for s in self.streams))
        if all(s.grid == grid for s in self.streams):
            return packed.unflatten(1, (-1, grid**2))
        latents = self.split(packed)
        folded = [pixel_unshuffle(latents[s.name], s.grid // grid) for s in self.streams]
        return torch.cat(folded, dim=1).flatten(2)

    def normalize(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standardise each stream per channel with the data set's statistics."""
        return {s.name: (latents[s.name] - m) / d for s in self.streams for m, d in [_statistics(s, latents[s.name])]}

    def denormalize(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `normalize`."""
        return {s.name: latents[s.name] * d + m for s in self.streams for m, d in [_statistics(s, latents[s.name])]}


def _statistics(stream: Stream, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as (channels, 1, 1), or 0 and 1 for a stream that is not normalised."""
    if not stream.mean:
        return like.new_zeros(1, 1, 1), like.new_ones(1, 1, 1)
    mean, std = torch.tensor([stream.mean, stream.std], dtype=like.dtype)[:, :, None, None]
    return sent(mean, like.device), sent(std, like.device)
