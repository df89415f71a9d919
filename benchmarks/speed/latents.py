"""Latents of the published shapes, random: 32 + 16 channels of 16×16 in float32, features of 768 in half precision."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.speed.measuring import COMPOSITE, SCHEDULE, network
from sfd import files
from sfd.data.latents import FEATURES, FLIP, LatentSet, Manifest, shard_path
from sfd.models.transformer import Transformer
from sfd.training.diffusion import DiffusionTask, LossSettings

COUNT, CHANNELS = 512, 768


def like_published(folder: Path) -> LatentSet:
    """Write a shard, if it is not there, and open it."""
    path = shard_path(folder, 0)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {s.name: (s.channels, s.grid, s.grid) for s in COMPOSITE.streams} | {FEATURES: (CHANNELS, 16, 16)}
        tensors = {"labels": torch.arange(COUNT) % 1000}
        for name, shape in shapes.items():
            dtype = torch.float16 if name == FEATURES else torch.float32
            tensors |= {name + suffix: torch.randn(COUNT, *shape).to(dtype) for suffix in ("", FLIP)}
        files.write_tensors(path, tensors)
    streams = {
        s.name: {
            "channels": s.channels,
            "grid": s.grid,
            "mean": (0.0,) * s.channels,
            "std": (1.0,) * s.channels,
            "tokenizer": "random",
        }
        for s in COMPOSITE.streams
    }
    record = {
        "format": 1,
        "data": "random",
        "count": COUNT,
        "classes": tuple(map(str, range(1000))),
        "dtype": "float32",
        "streams": streams,
        "features": {"channels": CHANNELS},
        "shards": ({"file": path.name, "count": COUNT, "bytes": path.stat().st_size, "sha256": None},),
    }
    return LatentSet(folder, Manifest.model_validate(record))


def task_like_published(size: str, batch: int, folder: Path) -> DiffusionTask:
    """Training of a network of one of the published sizes, REPA included."""
    config = network(size).config.model_copy(update={"repa_block": 2, "repa_channels": CHANNELS})
    made = Transformer(config)
    return DiffusionTask(made, like_published(folder), SCHEDULE, LossSettings(), seed=0, batch_size=batch)
