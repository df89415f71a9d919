"""Encoding of images into latent shards, once, in both orientations.

Each rank makes every WORLD_SIZE-th shard; the manifest is written once all exist. A shard's bytes are a function of the
images, the encoders and the settings alone, so an interrupted run resumes with the shards that are missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from sfd.data import shards
from sfd.data.images import ImageSource, to_tensor
from sfd.data.shards import FEATURES, FLIP, LABELS, Header, Manifest, build_manifest, read_header, shard_path
from sfd.data.statistics import ChannelStatistics
from sfd.encoders import SemanticEncoder, TextureEncoder, semantic_identity
from sfd.latents import SEMANTIC, TEXTURE
from sfd.models.compressor import Compressor
from sfd.utils import distributed, files
from sfd.utils.config import Free, PathText, Settings
from sfd.utils.device import full_float32
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar, say
from sfd.utils.threads import ahead

RECORD = "sfd"  # name of the entry in a shard's header


class LatentSettings(Settings):
    """Settings of the latent shards."""

    shard_size: int = Field(4096, gt=0, description="images per shard")
    batch_size: Free[int] = Field(256, gt=0, description="images per batch of the encoder")
    workers: Free[int] = Field(2, gt=0, description="threads that read images ahead of the encoder")
    dtype: Literal["float32", "float16"] = "float32"
    features: bool = Field(True, description="keep the semantic encoder's features, in half precision, for REPA")
    published: Free[PathText | None] = Field(
        None, description="train on the published shards in this folder; make none"
    )


@dataclass(frozen=True)
class LatentWriter:
    """Encodes images into a folder of latent shards."""

    images: ImageSource
    texture: TextureEncoder  # makes the texture stream
    semantic: SemanticEncoder | None  # features are kept if `settings.features`; None: no stream or loss needs them
    compressor: Compressor | None  # makes the semantic stream from the features; None where there is no such stream
    folder: Path
    settings: LatentSettings
    device: torch.device | str = "cpu"  # of the encoders

    @cached_property
    def tokenizers(self) -> dict[str, str]:
        """Identity of each stream's tokenizer, and of the encoder of the features."""
        tokenizers = {TEXTURE: self.texture.identity}
        if self.semantic is not None:
            if self.compressor is not None:
                tokenizers[SEMANTIC] = semantic_identity(self.semantic, self.compressor)
            tokenizers[FEATURES] = self.semantic.identity
        return tokenizers

    def inputs(self) -> dict[str, Any]:
        """What the latents are made from."""
        return {"identity of the images in data.source": self.images.identity, "tokenizers": self.tokenizers}

    def missing(self) -> list[int]:
        """The numbers of the shards that are not made yet; refuses a folder with shards of other inputs."""
        return [number for number in range(self._count) if self._header(number) is None]

    def write(self) -> None:
        """Make this rank's missing shards; when all are there, rank 0 writes the manifest.

        Without a process group, as in an array job, the rank that ends last writes it.
        """
        missing = self.missing()
        images = sum(len(self._indices(number)) for number in missing)
        needed = images * sum(value.nbytes for value in self._encode_shard(np.array([0])).values()) if images else 0
        say(f"{images:,} images to encode, {needed / 2**20:,.1f} MiB on disk")
        files.check_space(self.folder, needed, "leave the features out (latents.features=false, loss.repa=0)")
        own = [number for number in distributed.rank_slice(range(self._count)) if number in missing]
        with bar("encoding latents", sum(len(self._indices(number)) for number in own)) as shown:
            for number in own:
                self._write_shard(number, self._encode_shard(self._indices(number), shown.update))
        distributed.barrier()
        if distributed.has_group() and not distributed.is_main_process():
            return
        left = len(self.missing())
        if left:
            say(f"{left} of {self._count} shards are left to the other ranks")
        else:
            files.write_json(self.folder / shards.MANIFEST, self._manifest().model_dump(mode="json"), shared=True)

    @property
    def _count(self) -> int:
        return math.ceil(len(self.images) / self.settings.shard_size)

    def _indices(self, number: int) -> np.ndarray:
        """The images of a shard."""
        size = self.settings.shard_size
        return np.arange(number * size, min((number + 1) * size, len(self.images)))

    @cached_property
    def _inputs(self) -> dict[str, str]:
        """What the shards depend on; it is kept in each."""
        inputs = {"data": self.images.identity, **{f"tokenizer.{k}": v for k, v in self.tokenizers.items()}}
        return inputs | {name: str(value) for name, value in self.settings.fixed().items()}

    def _header(self, number: int) -> Header | None:
        """Read a shard's header; None: it is not made, or damaged."""
        path = shard_path(self.folder, number)
        try:
            header = read_header(path)
        except (SafetensorError, FileNotFoundError):
            return None
        if RECORD not in header.metadata:
            return None
        made_from = json.loads(header.metadata[RECORD])["inputs"]
        for key, value in self._inputs.items():
            if made_from.get(key) != value:
                raise SFDError(
                    f"{self.folder} holds latents made with {key} {made_from.get(key)}, but this run has {value}; "
                    "use another folder, or remove that one to encode anew"
                )
        return header

    @torch.no_grad()
    @full_float32()
    def _encode_shard(
        self, indices: np.ndarray, advance: Callable[[int], None] = lambda count: None
    ) -> dict[str, Tensor]:
        """Encode images in both orientations, reading a few batches ahead."""
        encoded = {LABELS: torch.from_numpy(self.images.labels[indices])}
        done = 0
        size = self.settings.batch_size
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        for pixels in ahead(self.images.load, batches, self.settings.workers):
            batch = to_tensor(pixels).to(self.device)
            for suffix, images in (("", batch), (FLIP, batch.flip(-1))):
                for name, value in self._encode(images).items():
                    dtype = torch.float16 if name == FEATURES else getattr(torch, self.settings.dtype)
                    if name + suffix not in encoded:
                        encoded[name + suffix] = torch.empty(len(indices), *value.shape[1:], dtype=dtype)
                    encoded[name + suffix][done : done + len(pixels)] = value
            done += len(pixels)
            advance(len(pixels))
        return encoded

    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        """Encode images (B, 3, S, S) in [-1, 1] into each stream's latents, and the features if they are kept."""
        latents = {TEXTURE: self.texture.encode(images)}
        if self.semantic is not None:
            features = self.semantic.encode(images)
            if self.compressor is not None:
                latents[SEMANTIC] = self.compressor.encode(features)
            if self.settings.features:
                latents[FEATURES] = features
        return latents

    def _write_shard(self, number: int, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise SFDError(
                    f"encoding gave non-finite values in {name!r}; retrain the encoder or use dtype: float32"
                )
        statistics = {}
        for name in sorted(tensors.keys() & {TEXTURE, SEMANTIC}):
            gathered = ChannelStatistics(tensors[name].shape[1])
            gathered.add(tensors[name])
            statistics[name] = gathered.record()
        # One entry, because the library writes several in any order, and equal shards are equal files.
        metadata = {RECORD: json.dumps({"inputs": self._inputs, "statistics": statistics})}
        files.write_tensors(shard_path(self.folder, number), tensors, metadata)

    def _manifest(self) -> Manifest:
        """Describe the shards by their headers alone."""
        headers = [read_header(shard_path(self.folder, number)) for number in range(self._count)]

        def statistics(name: str, channels: int) -> tuple[Tensor, Tensor]:
            merged = ChannelStatistics(channels)
            for header in headers:
                merged.merge(json.loads(header.metadata[RECORD])["statistics"][name])
            return merged.mean, merged.std

        return build_manifest(headers, statistics, self.tokenizers, self.images.identity, tuple(self.images.classes))
