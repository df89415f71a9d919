"""Small transformers with random weights, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor

from sfd.latents import CompositeLatent, Stream
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig

EQUAL = (Stream(name="texture", channels=4, grid=4), Stream(name="semantic", channels=2, grid=4, weight=2.0))
CLOCKS = ("semantic", "texture")


def configuration(streams: tuple[Stream, ...] = EQUAL, **changes: object) -> DiTConfig:
    values = {"depth": 2, "width": 48, "heads": 3, "num_classes": 5, "composite": CompositeLatent(streams=streams)}
    return DiTConfig(**(values | changes))


def random_dit(config: DiTConfig, seed: int = 0) -> LightningDiT:
    """A network in which no weight is zero, also those that are initialised to zero."""
    model = LightningDiT(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(config: DiTConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.composite.size, generator=generator)
    times = torch.rand(batch, len(config.composite.streams), generator=generator)
    if not config.clocks:
        times = times[:, :1].expand_as(times)
    return x, times, torch.randint(0, config.num_classes + 1, (batch,), generator=generator)
