"""A tiny real task for the training loop, and what its runs are compared by."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import torch
from torch import nn

from sfd.training.config import TrainSettings
from sfd.utils import rng

SETTINGS = TrainSettings(steps=12, batch_size=8, learning_rate=1e-2, ema=0.9, log_every=5, checkpoint_every=4)
TIMING = ("images_per_second", "checkpoint_pause", "waiting")


class Regression:
    """Learns the sum of eight numbers; may send itself a signal during one step."""

    name = "regression"

    def __init__(self, width=4, stop_at=None, number=signal.SIGINT):
        with rng.seeded(0, "regression"):
            self.model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))
        self.stop_at, self.number = stop_at, number

    def batch(self, step, samples):
        rows = [rng.generator(0, "x", step, i).standard_normal(8, dtype=np.float32) for i in samples]
        return {"x": torch.from_numpy(np.stack(rows)), "step": torch.tensor(step)}

    def loss(self, model, batch):
        if batch["step"].item() == self.stop_at:
            os.kill(os.getpid(), self.number)
        return {"loss": (model(batch["x"])[:, 0] - batch["x"].sum(1)).square().mean()}


class Meddling(Regression):
    """Calls a function during one step."""

    def __init__(self, at, do):
        super().__init__()
        self.at, self.do = at, do

    def loss(self, model, batch):
        if batch["step"].item() == self.at:
            self.do()
        return super().loss(model, batch)


class Poisoned(Regression):
    """Some steps have a loss, or a gradient, that is not finite."""

    def __init__(self, poisoned, kind="loss", **options):
        super().__init__(**options)
        self.poisoned, self.kind = poisoned, kind

    def loss(self, model, batch):
        loss = super().loss(model, batch)["loss"]
        if batch["step"].item() in self.poisoned:
            root = (loss - loss).sqrt()  # 0, with an infinite gradient
            loss = loss + (float("inf") if self.kind == "loss" else root)
        return {"loss": loss}


def changed(**fields):
    return SETTINGS.model_copy(update=fields)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timeless_log(folder):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_log(folder)]


def saved_steps(folder):
    return sorted(int(p.stem.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))
