"""Latent shards, made: every image encoded once, in both orientations, and a manifest that says what they are.

Several processes or machines may make one set: each makes the shards of its part, and the manifest is written of the
receipts beside them. A shard's bytes are a function of the images, the encoders and the settings alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd.data.images import ImageSource, to_tensor
from sfd.data.shards import FEATURES, FORMAT, MANIFEST, Manifest, ShardRecord, StreamRecord, shard_path
from sfd.data.statistics import ChannelRecord, ChannelStatistics
from sfd.utils import files
from sfd.utils.config import Free, Settings, parse
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar
from sfd.utils.shares import WHOLE, Share

Encode = Callable[[Tensor], Mapping[str, Tensor]]


class LatentSettings(Settings):
    """How images become latent shards."""

    shard_size: int = Field(4096, gt=0, description="images a shard")
    batch_size: Free[int] = Field(256, gt=0, description="images encoded at a time")
    workers: Free[int] = Field(2, gt=0, description="threads that read images ahead of the encoder")
    dtype: Literal["float32", "float16"] = "float32"
    features: bool = Field(True, description="keep the encoder's features, in half precision, for REPA")
    published: Free[str | None] = Field(None, description="train on the published shards in this folder; make none")


class Receipt(Settings):
    """The contents of `shard-NNNNN.json`, written once the shard beside it is whole, so that nobody reads it again."""

    job: dict[str, str] = Field(description="what all shards of the set must share")
    shard: ShardRecord
    shapes: dict[str, tuple[int, int, int]] = Field(description="of each stream and of features: channels, grid, grid")
    statistics: dict[str, ChannelRecord] = Field(description="of each stream, images that are not flipped")


@dataclass(frozen=True)
class Preparation:
    """A source on its way into shards, by one process or by several that share no more than the folder.

    Args:
        source: the images.
        tokenizers: the identity of what makes each stream, and of the encoder of "features".
        folder: where the shards and the manifest go.
        settings: shard size, precision and the like.
    """

    source: ImageSource
    tokenizers: Mapping[str, str]
    folder: Path
    settings: LatentSettings

    @property
    def job(self) -> dict[str, str]:
        """What the shards depend on."""
        job = {"data": self.source.identity, **{f"tokenizer.{k}": v for k, v in self.tokenizers.items()}}
        settings = self.settings.model_dump(include={"shard_size", "dtype", "features"})
        return job | {name: str(value) for name, value in settings.items()}

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(math.ceil(len(self.source) / self.settings.shard_size))

    def indices(self, number: int) -> np.ndarray:
        """The images of a shard."""
        size = self.settings.shard_size
        return np.arange(number * size, min((number + 1) * size, len(self.source)))

    def receipt(self, number: int) -> Receipt | None:
        """Find out whether a shard is made; None: it is not, or was cut short. Its content is not read.

        Raises:
            SFDError: it was made from other images, by other tokenizers, or with other settings.
        """
        path, shard = self.folder / f"shard-{number:05d}.json", shard_path(self.folder, number)
        if not path.exists():
            return None
        receipt = parse(Receipt, files.read_json(path, "folder of latents"), str(path))
        for key, value in self.job.items():
            if receipt.job.get(key) != value:
                raise SFDError(
                    f"{self.folder} holds latents made with {key} {receipt.job.get(key)}, but this run has {value}; "
                    "use another folder, or remove that one to encode anew"
                )
        return receipt if shard.is_file() and shard.stat().st_size == receipt.shard.bytes else None

    def missing(self) -> list[int]:
        """List the shards that are still to be made, by whichever part."""
        return [number for number in self.shards if self.receipt(number) is None]

    def make(self, encode: Encode, device: torch.device, share: Share = WHOLE) -> None:
        """Make the shards of one part that are not there yet.

        Args:
            encode: images (B, 3, S, S) in [-1, 1] → one latent (B, C, g, g) a stream, and perhaps "features".
            device: where `encode` computes.
            share: the number modulo `share.of` says whose a shard is.

        Raises:
            SFDError: the folder holds latents of other images or tokenizers, another process is at one of these
                shards, or the disk is full.
        """
        missing = self.missing()
        own = share.take(self.shards)
        name = "preparing latents" if share == WHOLE else f"preparing latents, part {share}"
        with (
            bar(name, sum(len(self.indices(number)) for number in own)) as shown,
            ThreadPoolExecutor(self.settings.workers) as pool,
        ):
            for number in own:
                if number not in missing:
                    shown.advance(len(self.indices(number)))
                    continue
                with self._claimed(number):
                    tensors = {"labels": torch.from_numpy(self.source.labels[self.indices(number)])}
                    tensors |= _encode(
                        self.source, self.indices(number), encode, self.settings, device, pool, shown.advance
                    )
                    self._write(number, tensors)
                del tensors  # one shard in memory at a time

    @contextmanager
    def _claimed(self, number: int) -> Iterator[None]:
        """Hold a shard for this process alone; the lock of one that is made serves no more, and goes."""
        lock = self.folder / f".shard-{number:05d}.lock"
        with files.file_lock(lock, f"{shard_path(self.folder, number)} is being made by another process; give each its "
                          "own --part I/N, with one N for all"):  # fmt: skip
            yield
            lock.unlink(missing_ok=True)

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a shard, then its receipt."""
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise SFDError(
                    f"encoding gave non-finite values in {name!r}; retrain the encoder or use dtype: float32"
                )
        path = shard_path(self.folder, number)
        files.write_tensors(path, tensors)
        kept = [name for name in self.tokenizers if name in tensors]
        statistics = {name: ChannelStatistics(tensors[name].shape[1]) for name in kept if name != FEATURES}
        for name, gathered in statistics.items():
            gathered.add(tensors[name])
        receipt = {
            "job": self.job,
            "shard": {
                "file": path.name,
                "count": len(tensors["labels"]),
                "bytes": path.stat().st_size,
                "sha256": files.checksum(path),
            },
            "shapes": {name: list(tensors[name].shape[1:]) for name in kept},
            "statistics": {name: gathered.record().model_dump() for name, gathered in statistics.items()},
        }
        files.write_json(path.with_suffix(".json"), receipt)

    def finish(self) -> Manifest:
        """Write the manifest, of what the receipts say alone: the same however the shards were shared out.

        Raises:
            SFDError: a shard is missing.
        """
        receipts = [self.receipt(number) for number in self.shards]
        made = [receipt for receipt in receipts if receipt is not None]
        if len(made) < len(receipts):
            raise SFDError(f"{shard_path(self.folder, receipts.index(None))} is missing; run the same command again")
        shapes = made[0].shapes
        manifest = Manifest(
            format=FORMAT,
            data=self.source.identity,
            count=len(self.source),
            classes=tuple(self.source.classes),
            dtype=self.settings.dtype,
            streams={name: self._stream(name, made) for name in made[0].statistics},
            features={
                "channels": shapes[FEATURES][0],
                "grid": shapes[FEATURES][1],
                "dtype": "float16",
                "tokenizer": self.tokenizers[FEATURES],
            }
            if FEATURES in shapes
            else None,
            shards=tuple(receipt.shard for receipt in made),
        )
        files.write_json(self.folder / MANIFEST, manifest.model_dump(mode="json"))
        return manifest

    def _stream(self, name: str, receipts: list[Receipt]) -> StreamRecord:
        channels, grid, _ = receipts[0].shapes[name]
        statistics = ChannelStatistics(channels)
        for receipt in receipts:
            statistics.merge(receipt.statistics[name])
        mean, std = tuple(statistics.mean.tolist()), tuple(statistics.std.tolist())
        return StreamRecord(channels=channels, grid=grid, mean=mean, std=std, tokenizer=self.tokenizers[name])


def prepare(
    source: ImageSource,
    encode: Encode,
    tokenizers: Mapping[str, str],
    folder: Path,
    settings: LatentSettings,
    *,
    device: torch.device,
) -> Manifest:
    """Encode a whole source into shards, or go on where an earlier call stopped; see `Preparation`."""
    preparation = Preparation(source, tokenizers, folder, settings)
    preparation.make(encode, device)
    return preparation.finish()


def _encode(
    source: ImageSource,
    indices: np.ndarray,
    encode: Encode,
    settings: LatentSettings,
    device: torch.device,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """Encode one shard's images, reading a few batches ahead."""
    chunks = [indices[i : i + settings.batch_size] for i in range(0, len(indices), settings.batch_size)]
    encoded: dict[str, Tensor] = {}
    done = 0
    for images in _read_ahead(pool, source.load, chunks, settings.workers):
        batch = to_tensor(images).to(device)
        for suffix, view in (("", batch), ("_flip", batch.flip(-1))):
            with torch.no_grad():
                latents = encode(view)
            for name, value in latents.items():
                if name != FEATURES or settings.features:
                    dtype = torch.float16 if name == FEATURES else getattr(torch, settings.dtype)
                    if name + suffix not in encoded:
                        encoded[name + suffix] = torch.empty(len(indices), *value.shape[1:], dtype=dtype)
                    encoded[name + suffix][done : done + len(images)] = value
        done += len(images)
        advance(len(images))
    return encoded


def _read_ahead(
    pool: ThreadPoolExecutor, load: Callable[[np.ndarray], np.ndarray], chunks: Sequence[np.ndarray], workers: int
) -> Iterator[np.ndarray]:
    """Give the images of every chunk in order; at most one chunk more than there are workers waits to be used."""
    pending: deque[Future[np.ndarray]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(load, chunk))
        if len(pending) > workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
