"""Latent shards made: every image encoded once, in both orientations, and a manifest that says what they are."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sfd import files
from sfd.data.images import ImageSource, to_tensor
from sfd.data.latents import FEATURES, FORMAT, MANIFEST, Manifest, shard_path
from sfd.data.statistics import ChannelStatistics
from sfd.errors import SFDError
from sfd.progress import bar
from sfd.settings import Settings, parse

Encode = Callable[[Tensor], Mapping[str, Tensor]]


class LatentSettings(Settings):
    """How images become latent shards."""

    shard_size: int = Field(4096, gt=0, description="images a shard")
    batch_size: int = Field(256, gt=0, description="images encoded at a time")
    workers: int = Field(2, gt=0, description="threads that read images ahead of the encoder")
    dtype: Literal["float32", "float16"] = "float32"
    features: bool = Field(True, description="keep the encoder's features, in half precision, for REPA")


def prepare(
    source: ImageSource,
    encode: Encode,
    tokenizers: Mapping[str, str],
    folder: Path,
    settings: LatentSettings,
    *,
    device: torch.device,
) -> Manifest:
    """Encode a whole source into shards, or go on where an earlier call stopped.

    Args:
        source: the images.
        encode: images (B, 3, S, S) in [-1, 1] → one latent (B, C, g, g) a stream, and perhaps "features".
        tokenizers: the identity of what makes each stream, and of the encoder of "features".
        folder: where the shards and the manifest go.
        settings: shard size, precision and the like.
        device: where `encode` computes.

    Raises:
        SFDError: the folder holds latents of other images or tokenizers, or the disk is full.
    """
    job = {"data": source.identity, **{f"tokenizer.{k}": v for k, v in tokenizers.items()}}
    job |= {name: str(value) for name, value in settings.model_dump().items() if name not in ("batch_size", "workers")}
    statistics: dict[str, ChannelStatistics] = {}
    formats: dict[str, torch.Size] = {}
    records = []
    with bar("preparing latents", len(source)) as shown, ThreadPoolExecutor(settings.workers) as pool:
        for number in range(math.ceil(len(source) / settings.shard_size)):
            indices = np.arange(number * settings.shard_size, min((number + 1) * settings.shard_size, len(source)))
            path = shard_path(folder, number)
            if path.exists():
                tensors = _finished(path, job)
                shown.advance(len(indices))
            else:
                tensors = {"labels": torch.from_numpy(source.labels[indices])}
                tensors |= _encode(source, indices, encode, settings, device, pool, shown.advance)
                _write_shard(path, tensors, job)
            for name in tokenizers:
                if name != FEATURES:
                    statistics.setdefault(name, ChannelStatistics(tensors[name].shape[1])).add(tensors[name])
            formats = {name: tensor.shape[1:] for name, tensor in tensors.items()}
            del tensors  # one shard in memory at a time
            records.append({"file": path.name, "count": len(indices), "bytes": path.stat().st_size})
            records[-1]["sha256"] = files.checksum(path)
    manifest = {
        "format": FORMAT,
        "data": source.identity,
        "count": len(source),
        "classes": list(source.classes),
        "dtype": settings.dtype,
        "streams": {name: _stream_record(formats[name], statistics[name], tokenizers[name]) for name in statistics},
        "features": _features_record(formats, tokenizers) if settings.features and FEATURES in formats else None,
        "shards": records,
    }
    files.write_json(folder / MANIFEST, manifest)
    return parse(Manifest, manifest, MANIFEST)


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


def _write_shard(path: Path, tensors: dict[str, Tensor], job: Mapping[str, str]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise SFDError(f"encoding gave non-finite values in {name!r}; retrain the encoder or use dtype: float32")
    # One entry, because the order of several in the file is not always the same.
    files.write_tensors(path, tensors, {"job": json.dumps(dict(job))})


def _finished(path: Path, job: Mapping[str, str]) -> dict[str, Tensor]:
    """Read a shard that an earlier call finished."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as handle:
            before = json.loads((handle.metadata() or {}).get("job", "{}"))
    except (SafetensorError, OSError) as error:
        raise SFDError(f"{path} is damaged ({error}); remove it and run the same command again") from None
    for key, value in job.items():
        if before.get(key) != value:
            raise SFDError(
                f"{path.parent} holds latents made with {key} {before.get(key)}, but this run has {value}; "
                "use another folder, or remove that one to encode anew"
            )
    return files.read_tensors(path)


def _stream_record(shape: torch.Size, statistics: ChannelStatistics, tokenizer: str) -> dict[str, Any]:
    mean, std = statistics.mean.tolist(), statistics.std.tolist()
    return {"channels": shape[0], "grid": shape[1], "mean": mean, "std": std, "tokenizer": tokenizer}


def _features_record(formats: Mapping[str, torch.Size], tokenizers: Mapping[str, str]) -> dict[str, Any]:
    channels, grid, _ = formats[FEATURES]
    return {"channels": channels, "grid": grid, "dtype": "float16", "tokenizer": tokenizers[FEATURES]}
