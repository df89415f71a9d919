"""Latents of the published shapes, random: 32 + 16 channels of 16×16 in float32, features of 768 in half precision."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.speed.measuring import COMPOSITE, SCHEDULE, network
from sfd.data.shards import FEATURES, FLIP, LatentSet, Manifest, shard_path
from sfd.models.dit import LightningDiT
from sfd.training.tasks.diffusion import DiffusionTask, LossSettings
from sfd.utils import files

SHARDS, IMAGES = 16, 32  # of each shard: as in ImageNet's, a batch reads from many of them
CHANNELS = 768


def like_published(folder: Path) -> LatentSet:
    """Write shards, where they are not there, and open them."""
    folder = folder / f"{SHARDS}-shards-of-{IMAGES}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [shard_path(folder, number) for number in range(SHARDS)]
    for number, path in enumerate(paths):
        if not path.exists():
            _write_shard(path, number)
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
        "count": SHARDS * IMAGES,
        "classes": tuple(map(str, range(1000))),
        "dtype": "float32",
        "streams": streams,
        "features": {"channels": CHANNELS},
        "shards": tuple(
            {"file": path.name, "count": IMAGES, "bytes": path.stat().st_size, "sha256": None} for path in paths
        ),
    }
    return LatentSet(folder, Manifest.model_validate(record))


def _write_shard(path: Path, number: int) -> None:
    shapes = {s.name: (s.channels, s.grid, s.grid) for s in COMPOSITE.streams} | {FEATURES: (CHANNELS, 16, 16)}
    tensors = {"labels": torch.arange(number * IMAGES, (number + 1) * IMAGES) % 1000}
    for name, shape in shapes.items():
        dtype = torch.float16 if name == FEATURES else torch.float32
        tensors |= {name + suffix: torch.randn(IMAGES, *shape).to(dtype) for suffix in ("", FLIP)}
    files.write_tensors(path, tensors)


def task_like_published(size: str, batch: int, folder: Path) -> DiffusionTask:
    """Training of a network of one of the published sizes, REPA included."""
    config = network(size).config.model_copy(update={"repa_block": 2, "repa_channels": CHANNELS})
    made = LightningDiT(config)
    return DiffusionTask(made, like_published(folder), SCHEDULE, LossSettings(), seed=0, batch_size=batch)
