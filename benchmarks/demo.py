"""Latents to train on: the demo's, made once, and random ones of the published shapes.

The demo's tokenizers are trained for two steps, as speed does not depend on their weights.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.measure import COMPOSITE, ROOT, SCHEDULE, network
from sfd.data.shards import FEATURES, FLIP, LatentSet, Manifest, shard_path
from sfd.training.tasks.diffusion import DiffusionTask, LossSettings
from sfd.utils import files

RECIPE = ROOT / "recipes" / "shapes-demo.yaml"
FEW = [f"{part}.train.{field}" for part in ("texture", "semantic", "compressor") for field in ("steps=2", "warmup=0")]
DATA = ["data.count=2000", "train.warmup=0"]
SHARDS, IMAGES = 16, 32  # per shard: as in ImageNet's, a batch reads from many of them
CHANNELS = 768


def command(name: str, folder: Path, *overrides: str, device: str = "cpu") -> list[str]:
    """The command line of one stage of the demo's recipe in a folder."""
    arguments = [name, str(RECIPE), *FEW, *DATA, *overrides, "--out", str(folder), "--device", device]
    return [sys.executable, "-m", "sfd", *arguments]


def stage(name: str, folder: Path, *overrides: str, device: str = "cpu") -> None:
    """Run one stage of the demo's recipe in a folder; one that is done is not repeated."""
    subprocess.run(command(name, folder, *overrides, device=device), check=True, capture_output=True, text=True)


def prepared(folder: Path) -> Path:
    """Make everything that the demo's transformer is trained on; give the run's folder."""
    if not (folder / "latents" / "manifest.json").exists():
        for name in ("train-texture", "train-semantic", "train-semvae", "prepare"):
            stage(name, folder)
    return folder


def published_task(size: str, batch: int, folder: Path) -> DiffusionTask:
    """Training of a network of a published size with REPA, on random latents of the published shapes."""
    net = network(size, repa_block=2, repa_channels=CHANNELS)
    return DiffusionTask(net, _random_latents(folder), SCHEDULE, LossSettings(), seed=0, batch_size=batch)


def _random_latents(folder: Path) -> LatentSet:
    """32 + 16 channels of 16×16 in float32, features of 768 in half precision; written where they are not there."""
    folder = folder / f"{SHARDS}-shards-of-{IMAGES}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [shard_path(folder, number) for number in range(SHARDS)]
    for number, path in enumerate(paths):
        if not path.exists():
            _write_shard(path, number)
    streams = {
        s.name: {"channels": s.channels, "grid": s.grid, "tokenizer": "random"}
        | {"mean": (0.0,) * s.channels, "std": (1.0,) * s.channels}
        for s in COMPOSITE.streams
    }
    shards = tuple({"file": p.name, "count": IMAGES, "bytes": p.stat().st_size, "sha256": None} for p in paths)
    record = {"format": 1, "data": "random", "dtype": "float32", "count": SHARDS * IMAGES, "shards": shards}
    record |= {"classes": tuple(map(str, range(1000))), "streams": streams, "features": {"channels": CHANNELS}}
    return LatentSet(folder, Manifest.model_validate(record))


def _write_shard(path: Path, number: int) -> None:
    shapes = {s.name: (s.channels, s.grid, s.grid) for s in COMPOSITE.streams} | {FEATURES: (CHANNELS, 16, 16)}
    tensors = {"labels": torch.arange(number * IMAGES, (number + 1) * IMAGES) % 1000}
    for name, shape in shapes.items():
        dtype = torch.float16 if name == FEATURES else torch.float32
        tensors |= {name + suffix: torch.randn(IMAGES, *shape).to(dtype) for suffix in ("", FLIP)}
    files.write_tensors(path, tensors)
