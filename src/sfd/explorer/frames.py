"""States of a sampling as frames to scrub through: both streams, the estimate of the clean image, velocity norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfd.evaluation.figures import picture, scaled, semantic_colours
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model
from sfd.latents import TEXTURE
from sfd.sampling import Progress
from sfd.schedule import Schedule
from sfd.utils.errors import SFDError

COLUMNS = 8  # frames in a row of a sheet
MAX_FRAMES = 49
MAX_SIDE = 256  # pixels of an image; larger ones are scaled down
MAX_PIXELS = 1 << 25  # of all sheets of a result: large images get fewer frames
MAX_STATES = 1000  # of one sampling; an adaptive solver may take any number of steps
DECODED_AT_ONCE = 8  # images between two looks at whether to stop


class Superseded(Exception):
    """A newer request has arrived, so nobody waits for this one."""


@dataclass
class Run:
    """Images that are sampled together. An instance is the callback of its sampling."""

    titles: Sequence[str]  # one per image
    noise: Tensor  # (B, N), the state at base time 0
    labels: Sequence[int]  # one per image; the null class is the number of classes
    schedule: Schedule
    stop: Callable[[], bool]
    states: list[Progress] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with noise."""
        self.states.append(Progress(0.0, torch.zeros(len(self.schedule.streams)), self.noise, 0))

    def __call__(self, state: Progress) -> None:
        """Keep a state; stop the sampling if something newer waits."""
        check(self.stop)
        if len(self.states) > MAX_STATES:
            raise SFDError(f"the solver took more than {MAX_STATES} steps; choose one with a fixed number of steps")
        self.states.append(state)


def check(stop: Callable[[], bool]) -> None:
    """Raise `Superseded` if something newer waits."""
    if stop():
        raise Superseded


def panels(
    model: Model, runs: Sequence[Run], config: SamplingConfig, guiding: Model | None, side: int, pixels: int
) -> list[dict[str, Any]]:
    """Make one record per image of all runs, as the page reads it.

    Sheets are pictures of all frames, `COLUMNS` in a row. Semantic colours are the same for all records.
    """
    side = min(side, image_side(model))
    count = sum(len(run.titles) for run in runs)
    most = max(2, min(MAX_FRAMES, pixels // (2 * side**2 * count)))
    found: list[dict[str, Any]] = []
    plans = []
    for number, run in enumerate(runs):
        chosen = evenly(run.states, most)
        x = torch.stack([state.x.to(model.device) for state in chosen])  # (F, B, N)
        v = _velocities(model, run, chosen, config, guiding)
        remaining = torch.stack([model.composite.per_entry(1 - state.t.float()) for state in chosen]).to(x.device)
        estimates = x + remaining[:, None] * v
        norms = torch.stack([part.square().mean(-1).sqrt() for part in v.split(model.composite.sizes, -1)], -1)
        for index, title in enumerate(run.titles):
            plans.append(model.composite.unpack(x[:, index].cpu())[plan_stream(model)].numpy())
            found.append({
                "title": title,
                "schedule": number,
                "u": [round(state.u, 5) for state in chosen],
                "t": [[round(t, 5) for t in state.t.tolist()] for state in chosen],
                "velocity": [[round(norm, 4) for norm in each] for each in norms[:, index].tolist()],
                "texture": sheet(scaled(_decode(model, x[:, index], config, run.stop), side)),
                "estimate": sheet(scaled(_decode(model, estimates[:, index], config, run.stop), side)),
            })  # fmt: skip
    colours = semantic_colours(np.concatenate(plans))
    for panel, pictures in zip(found, np.split(colours, np.cumsum([len(plan) for plan in plans])[:-1]), strict=True):
        panel["semantic"] = sheet(pictures)
    return found


def evenly(states: Sequence[Progress], most: int) -> list[Progress]:
    """At most `most` of the states, both ends included, evenly over base time."""
    if len(states) <= most:
        return list(states)
    base = np.array([state.u for state in states])
    nearest = {int(np.abs(base - u).argmin()) for u in np.linspace(0, 1, most)}
    return [states[index] for index in sorted(nearest)]


def plan_stream(model: Model) -> str:
    """Name of the stream that is shown as the plan: the first that is not texture."""
    return next(name for name in model.composite.names if name != TEXTURE)


def image_side(model: Model) -> int:
    """Rows and columns of an image."""
    return model.composite[TEXTURE].grid * model.texture.downsample


def sheet(images: np.ndarray) -> str:
    """Lay images, uint8 (F, H, W, 3), out in rows of `COLUMNS`, as a data URI."""
    count, height, width = images.shape[:3]
    rows = -(-count // COLUMNS)
    filled = np.zeros((rows * COLUMNS, height, width, 3), np.uint8)
    filled[:count] = images
    laid = filled.reshape(rows, COLUMNS, height, width, 3).swapaxes(1, 2).reshape(rows * height, COLUMNS * width, 3)
    return picture(Image.fromarray(laid), height)


def _velocities(
    model: Model, run: Run, states: Sequence[Progress], config: SamplingConfig, guiding: Model | None
) -> Tensor:
    """The network's guided velocity at each state, (F, B, N), also where a stream follows a given path."""
    velocity = model.velocity_field(torch.tensor(run.labels, device=model.device), config, guiding)
    found = []
    for state in states:
        check(run.stop)
        found.append(velocity(state.x.to(model.device), state.t.float()).float())
    return torch.stack(found)


def _decode(model: Model, latents: Tensor, config: SamplingConfig, stop: Callable[[], bool]) -> np.ndarray:
    found = []
    for part in latents.split(DECODED_AT_ONCE):
        check(stop)
        found.append(model.decode(part, config.precision))
    return np.concatenate(found)
