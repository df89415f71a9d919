"""Latent shards, read: every image in both orientations, beside a manifest that says what they are.

A shard holds, for each stream k, `k` and `k_flip` (n, channels, grid, grid), `labels` (n), and perhaps `features` and
`features_flip`: the encoder's own output, which REPA aligns with. `manifest.json` holds counts, shapes, statistics,
the identities of the tokenizers and a checksum a shard; it is written last, so where it stands the rest is whole.
Shards in the published format hold the same under other names (`sfd.data.published`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd.latents import CompositeLatent, Stream
from sfd.utils import files
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError, unknown

MANIFEST = "manifest.json"
FEATURES = "features"
FLIP = "_flip"
FORMAT: Literal[1] = 1
# Checksums of anything larger would take longer at every start than they are worth; `verify` is there for those.
CHECKED_AT_OPENING = 2 << 30
# From this many bytes on, an image is copied by itself: gathering many first would be one more pass over all of them.
LARGE = 1 << 14


class StreamRecord(Settings):
    """What the manifest says of one stream."""

    channels: int = Field(gt=0)
    grid: int = Field(gt=0)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: str


class ShardRecord(Settings):
    """What the manifest says of one shard."""

    file: str = Field(pattern=r"^[^/\\]+\.safetensors$")
    count: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str | None = Field(None, description="null: made elsewhere, and never read whole here")


class Manifest(Settings):
    """The contents of `manifest.json`."""

    format: Literal[1]
    data: str
    count: int = Field(gt=0)
    classes: tuple[str, ...]
    dtype: str
    streams: dict[str, StreamRecord]
    features: dict[str, Any] | None
    shards: tuple[ShardRecord, ...]
    keys: dict[str, str] = Field({}, description="what streams and features are called in the shards, if otherwise")


def shard_path(folder: Path, number: int) -> Path:
    """Name the file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """Read what `prepare` wrote last.

    Raises:
        SFDError: it is missing or damaged.
    """
    return parse(Manifest, files.read_json(folder / MANIFEST, "folder of latents"), str(folder / MANIFEST))


class LatentSet:
    """Latents, read through memory maps: opening costs nothing, and memory holds only what is used."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        """Open a folder of shards.

        Args:
            folder: where the shards lie.
            manifest: what they are; None: the folder's own `manifest.json` says.

        Raises:
            SFDError: the manifest or a shard is missing, damaged, or does not belong to the others.
        """
        self.folder = folder
        self.manifest = read_manifest(folder) if manifest is None else manifest
        self.verify(checksums=sum(s.bytes for s in self.manifest.shards) <= CHECKED_AT_OPENING)
        self._shards = [files.read_tensors(folder / shard.file) for shard in self.manifest.shards]
        self._starts = np.cumsum([0] + [shard.count for shard in self.manifest.shards])
        self.labels = torch.cat([shard["labels"] for shard in self._shards]).long()

    def __len__(self) -> int:
        return self.manifest.count

    def verify(self, *, checksums: bool) -> None:
        """Check that every shard is there, has its size and, if asked for, its checksum (where it has one).

        Raises:
            SFDError: the first shard that fails, by name.
        """
        again = "fetch it again" if self.manifest.keys else "run the command that prepared the latents again"
        if sum(shard.count for shard in self.manifest.shards) != self.manifest.count:
            raise SFDError(f"{self.folder / MANIFEST} is damaged: its shards do not add up to {self.manifest.count}")
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise SFDError(f"{path} is missing; {again}")
            changed = checksums and shard.sha256 is not None and files.checksum(path) != shard.sha256
            if path.stat().st_size != shard.bytes or changed:
                raise SFDError(f"{path} is damaged; remove it and {again}")

    def composite(self, patch_sizes: Mapping[str, int], weights: Mapping[str, float]) -> CompositeLatent:
        """Describe the streams for a network; those not named have patch size 1 and weight 1."""
        streams = tuple(
            Stream(
                name=name,
                patch_size=patch_sizes.get(name, 1),
                weight=weights.get(name, 1.0),
                **record.model_dump(),
            )
            for name, record in self.manifest.streams.items()
        )
        return CompositeLatent(streams=streams)

    def read(
        self, name: str, indices: np.ndarray, flips: np.ndarray, dtype: torch.dtype | None = torch.float32
    ) -> Tensor:
        """Gather one stream's latents, or "features".

        Args:
            name: a stream, or "features".
            indices: (B,) image numbers.
            flips: (B,) booleans: which of the two orientations.
            dtype: of what is returned; None: as it is stored.

        Returns:
            (B, C, g, g), as encoded (not normalised).

        Raises:
            SFDError: nothing to read, or there is no such stream.
        """
        if name not in self.manifest.streams and (name != FEATURES or self.manifest.features is None):
            raise unknown("stream of latents", name, self.manifest.streams)
        key = self.manifest.keys.get(name, name)
        if not len(indices):
            raise SFDError("no indices were given to read")
        owners = np.searchsorted(self._starts, indices, side="right") - 1
        first = self._shards[0][key]
        out = torch.empty(len(indices), *first.shape[1:], dtype=dtype or first.dtype)
        for owner in np.unique(owners):
            for flip in (False, True):
                places = np.flatnonzero((owners == owner) & (flips == flip))
                stored = self._shards[owner][key + (FLIP if flip else "")]
                rows = indices[places] - self._starts[owner]
                if stored[0].nbytes >= LARGE:
                    for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                        out[place].copy_(stored[row])
                else:
                    out[torch.from_numpy(places)] = stored[torch.from_numpy(rows)].to(out.dtype)
        return out
