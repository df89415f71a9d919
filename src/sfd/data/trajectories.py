"""Trajectories of a model's sampling, stored in shards: what a few-step student learns from.

Trajectory i starts from noise that is a function of (seed, i) and has class i mod the number of classes. A shard holds
`labels` (n,) and `states` (n, G + 1, N), float32, at the base times of the student's finest steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfd.data.shards import shard_path
from sfd.latents import CompositeLatent
from sfd.utils import distributed, files, rng
from sfd.utils.progress import bar

SHARD_SIZE = 1024  # trajectories
Follow = Callable[[Tensor, Tensor], Tensor]
"""states(labels, noise): from labels (B,) and noise (B, N), on the CPU, to states (B, G + 1, N), the noise first."""


def shard_paths(folder: Path, count: int) -> tuple[Path, ...]:
    """Name the files of `count` trajectories."""
    return tuple(shard_path(folder, number) for number in range(math.ceil(count / SHARD_SIZE)))


def write_trajectories(
    folder: Path,
    count: int,
    follow: Follow,
    *,
    latent: CompositeLatent,
    states: int,
    labels: Sequence[int],
    seed: int,
    batch_size: int,
) -> None:
    """Make this rank's missing shards.

    Args:
        folder: gets the shards.
        count: number of trajectories.
        follow: carries noise to data.
        latent: the streams.
        states: G + 1, of one trajectory.
        labels: trajectory i has labels[i mod len(labels)].
        seed: of the noise.
        batch_size: trajectories at once.
    """
    paths = shard_paths(folder, count)
    own = [n for n in distributed.rank_slice(range(len(paths))) if not paths[n].exists()]
    files.check_space(folder, len(own) * SHARD_SIZE * states * latent.size * 4, "give fewer trajectories")
    with bar("trajectories", len(own) * SHARD_SIZE) as shown:
        for number in own:
            indices = range(number * SHARD_SIZE, min((number + 1) * SHARD_SIZE, count))
            chosen = torch.tensor([labels[i % len(labels)] for i in indices])
            noise = torch.cat([rng.normal([seed], latent.size, "trajectory", i) for i in indices])
            parts = []
            for y, x in zip(chosen.split(batch_size), noise.split(batch_size), strict=True):
                parts.append(follow(y, x).float())
                shown.update(len(x))
            files.write_tensors(paths[number], {"labels": chosen, "states": torch.cat(parts)})


class TrajectorySet:
    """Trajectories on disk, read through memory maps."""

    def __init__(self, folder: Path, count: int) -> None:
        self._shards = [files.read_tensors(path) for path in shard_paths(folder, count)]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Give two states (B, N) of each trajectory, by their number in the grid, and its label (B,)."""
        columns = []
        for index, a, b in zip(indices.tolist(), first.tolist(), last.tolist(), strict=True):
            shard, row = self._shards[index // SHARD_SIZE], index % SHARD_SIZE
            columns.append((shard["states"][row, a], shard["states"][row, b], shard["labels"][row]))
        starts, ends, labels = (torch.stack(column) for column in zip(*columns, strict=True))
        return starts, ends, labels
