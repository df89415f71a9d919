"""Reading latent shards.

A shard is a safetensors file. For each stream k it holds `k` and `k_flip` (n, channels, grid, grid): the images and
their mirror images; `labels` (n); and perhaps `features` and `features_flip`, the semantic encoder's output, which REPA
aligns with. `manifest.json` holds counts, shapes, statistics and the identities of the tokenizers. It is written last,
so where it exists the rest is whole. Shards in the published format differ in names only (`sfd.data.published`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from sfd.latents import SEMANTIC, TEXTURE, CompositeLatent, Stream
from sfd.utils import files
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError, unknown

MANIFEST = "manifest.json"
FEATURES = "features"
LABELS = "labels"
FLIP = "_flip"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and PyTorch's
# From this many bytes per image on, images are copied one by one: gathering them first would be one more pass.
LARGE = 1 << 14


class StreamRecord(Settings):
    """One stream in the manifest."""

    channels: int = Field(gt=0)
    grid: int = Field(gt=0)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: str


class ShardRecord(Settings):
    """One shard in the manifest."""

    file: str = Field(pattern=r"^[^/\\]+\.safetensors$")
    count: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str | None = Field(None, description="written by version 0.1.0; not used")


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
    keys: dict[str, str] = Field({}, description="names of streams and features in the shards, where they differ")


class Entry(NamedTuple):
    """Type ("F32", …) and shape of a tensor in a shard."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What is known of a shard without reading its tensors."""

    path: Path
    size: int  # bytes of the file
    entries: dict[str, Entry]
    metadata: dict[str, str]

    @property
    def count(self) -> int:
        """Number of images."""
        return self.entries[LABELS].shape[0]


def read_header(path: Path) -> Header:
    """Read a shard's header; raises safetensors' SafetensorError where the file is damaged."""
    with safe_open(path, "pt") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        entries = {name: Entry(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        return Header(path, path.stat().st_size, entries, handle.metadata() or {})


def shard_path(folder: Path, number: int) -> Path:
    """Name the file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's `manifest.json`."""
    return parse(Manifest, files.read_json(folder / MANIFEST, "folder of latents"), str(folder / MANIFEST))


def build_manifest(
    headers: Sequence[Header],
    statistics: Callable[[str, int], tuple[Tensor, Tensor]],
    tokenizers: Mapping[str, str],
    data: str,
    classes: tuple[str, ...],
    keys: Mapping[str, str] | None = None,
) -> Manifest:
    """Describe shards by their headers.

    Args:
        headers: of all shards, in order.
        statistics: gives mean and standard deviation, (C,) each, of a stream with a number of channels.
        tokenizers: identity of what made each stream and the features, where it is known.
        data: identity of the images.
        classes: their names, in the order of the labels.
        keys: names of streams and features in the shards, where they differ.
    """
    streams, features = {}, None
    for name in (TEXTURE, SEMANTIC, FEATURES):
        key = (keys or {}).get(name, name)
        if key not in headers[0].entries:
            continue
        dtype, (_, channels, grid, _) = headers[0].entries[key]
        about: dict[str, Any] = {"channels": channels, "grid": grid, "tokenizer": tokenizers.get(name, "")}
        if name == FEATURES:
            features = {**about, "dtype": FLOATS[dtype]}
        else:
            mean, std = (tuple(values.tolist()) for values in statistics(name, channels))
            streams[name] = StreamRecord(mean=mean, std=std, **about)
    return Manifest(
        format=1,
        data=data,
        count=sum(header.count for header in headers),
        classes=classes,
        dtype=FLOATS[headers[0].entries[(keys or {}).get(TEXTURE, TEXTURE)].dtype],
        streams=streams,
        features=features,
        shards=tuple(ShardRecord(file=h.path.name, count=h.count, bytes=h.size) for h in headers),
        keys=dict(keys or {}),
    )


class LatentSet:
    """A folder of latents, read through memory maps: opening is fast, and memory holds only what is used.

    Args:
        folder: of the shards.
        manifest: describes them; None: the folder's own `manifest.json`.
    """

    def __init__(self, folder: Path | str, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder) if manifest is None else manifest
        self._check()
        self._shards = [files.read_tensors(self.folder / shard.file) for shard in self.manifest.shards]
        self._starts = np.cumsum([0] + [shard.count for shard in self.manifest.shards])
        self.labels = torch.cat([shard[LABELS] for shard in self._shards]).long()

    def __len__(self) -> int:
        return self.manifest.count

    def _check(self) -> None:
        """Refuse a folder that lacks a shard or holds one of another size."""
        again = "fetch it again" if self.manifest.keys else "run the command that prepared the latents again"
        if sum(shard.count for shard in self.manifest.shards) != self.manifest.count:
            raise SFDError(f"{self.folder / MANIFEST} is damaged: its shards do not add up to {self.manifest.count}")
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise SFDError(f"{path} is missing; {again}")
            if path.stat().st_size != shard.bytes:
                raise SFDError(f"{path} is damaged; remove it and {again}")

    def composite(
        self, patch_sizes: Mapping[str, int] | None = None, weights: Mapping[str, float] | None = None
    ) -> CompositeLatent:
        """Describe the streams for a network; patch sizes and weights that are not given are 1."""
        streams = []
        for name, record in self.manifest.streams.items():
            patch_size, weight = (patch_sizes or {}).get(name, 1), (weights or {}).get(name, 1.0)
            streams.append(Stream(name=name, patch_size=patch_size, weight=weight, **record.model_dump()))
        return CompositeLatent(streams=tuple(streams))

    def read(
        self, name: str, indices: np.ndarray, flips: np.ndarray, dtype: torch.dtype | None = torch.float32
    ) -> Tensor:
        """Gather latents of one stream, or "features".

        Args:
            name: a stream, or "features".
            indices: (B,) image numbers.
            flips: (B,) booleans: True for mirror images.
            dtype: of the result; None: as stored.

        Returns:
            (B, C, g, g), as encoded (not normalised).
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
