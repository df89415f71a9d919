"""One of several ranks that train together; started by torchrun.

    worker.py FOLDER

FOLDER holds latents and, in jobs.json, a list of jobs [name, settings, stop]. Each trains into FOLDER/name; `stop`, if
not null, is [step, rank]: that process gets SIGTERM during that step. The weights of a finished job are written beside,
as name-RANK.safetensors.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from helpers.latents import make_model, make_task
from sfd.data.shards import LatentSet
from sfd.models.dit import LightningDiT
from sfd.training.config import TrainSettings
from sfd.training.trainer import fit
from sfd.utils import distributed, files
from sfd.utils.config import parse
from sfd.utils.errors import Interrupted

CPU = torch.device("cpu")


class Stopped:
    """A task during one of whose steps one process gets a signal."""

    def __init__(self, task, step: int, rank: int) -> None:
        self.task, self.at, self.rank, self.name, self.model = task, step, rank, task.name, task.model

    def batch(self, step, samples):
        return self.task.batch(step, samples) | {"step": torch.tensor(step)}

    def loss(self, model, batch):
        if batch["step"] == self.at and distributed.rank() == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.task.loss(model, batch)


def train(folder: Path, name: str, settings: dict, stop: tuple[int, int] | None = None) -> LightningDiT | None:
    """Train a job; None if it was stopped."""
    latents = LatentSet(folder / "latents")
    parsed = parse(TrainSettings, settings)
    model = make_model(latents)
    task = make_task(latents, model=model, batch_size=parsed.batch_size)
    try:
        return fit(Stopped(task, *stop) if stop else task, parsed, folder / name, device=CPU)
    except Interrupted:
        return None


def main(folder: Path) -> None:
    distributed.init("cpu")
    for name, settings, stop in json.loads((folder / "jobs.json").read_text()):
        trained = train(folder, name, settings, stop)
        if trained is not None:
            files.write_tensors(folder / f"{name}-{distributed.rank()}.safetensors", trained.state_dict())
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
