"""A small model with weights that no training gave it: all of them random, so that nothing it does is trivial."""

from __future__ import annotations

import torch

from sfd.encoders import autoencoder_kl
from sfd.generation.model import Model
from sfd.latents import CompositeLatent, Stream
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig
from sfd.schedule import build_schedule
from sfd.utils import rng

TEXTURE = Stream(name="texture", channels=2, grid=2, mean=(0.1, -0.2), std=(0.7, 0.5))
SEMANTIC = Stream(name="semantic", channels=3, grid=2)
COMPOSITE = CompositeLatent(streams=(TEXTURE, SEMANTIC))
CLASSES = ("disk", "ring", "star")
DELTA = 0.3


def random_model(
    seed: int,
    classes: tuple[str, ...] = CLASSES,
    composite: CompositeLatent = COMPOSITE,
    network: dict | None = None,
    **schedule,
) -> Model:
    """A model whose velocity depends on everything: no weight is zero."""
    size = {"depth": 1, "width": 16, "heads": 2} | (network or {})
    config = DiTConfig(**size, composite=composite, num_classes=len(classes), clocks=composite.names)
    with rng.seeded(seed, "test"):
        texture = autoencoder_kl.build(autoencoder_kl.Config(patch=2, widths=(8,), latent_channels=2))
        transformer = LightningDiT(config)
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    spec = schedule or {"name": "offset", "delta": DELTA}
    return Model(transformer.eval(), build_schedule(spec, composite.names), texture.eval(), classes)
