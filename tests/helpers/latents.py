"""Small latents, and a small network and its task on them."""

import torch
from torch import nn
from torch.nn import functional as F

from helpers.encoders import Encoder
from sfd.data.encode import LatentSettings, LatentWriter
from sfd.data.published import describe_published
from sfd.data.shards import FEATURES, LatentSet
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig
from sfd.schedule import build_schedule
from sfd.training.tasks.diffusion import DiffusionTask, LossSettings
from sfd.utils import rng

STREAMS = ("texture", "semantic")
OFFSET = {"name": "offset", "delta": 0.3}
MANY = 4000


def encode(images):
    """Texture (B, 3, 4, 4), semantic (B, 1, 4, 4) and features (B, 6, 4, 4), none its own mirror image."""
    pooled = F.avg_pool2d(images, 4)
    features = torch.cat([pooled, pooled.square()], 1)
    return {"texture": pooled, "semantic": features.mean(1, keepdim=True), FEATURES: features}


def make_latents(source, folder, **fields):
    texture, semantic = (Encoder(lambda images, name=name: encode(images)[name]) for name in ("texture", FEATURES))
    compressor = Encoder(lambda features: features.mean(1, keepdim=True))
    LatentWriter(source, texture, semantic, compressor, folder, LatentSettings(shard_size=10, **fields)).write()
    return LatentSet(folder)


def open_published(folder):
    return LatentSet(folder, describe_published(folder))


def make_model(latents, repa=True, **more):
    composite = latents.composite({}, {"texture": 1.0, "semantic": 2.0})
    classes = len(latents.manifest.classes)
    fields = more | ({"repa_block": 1, "repa_channels": 6, "repa_width": 16} if repa else {})
    model = LightningDiT(
        DiTConfig(depth=2, width=16, heads=2, composite=composite, num_classes=classes, clocks=STREAMS, **fields)
    )
    with rng.seeded(0, "heads"):  # they start at zero, where all velocities are alike
        for head in model.heads:
            nn.init.normal_(head.weight)
    return model


def make_task(latents, schedule=OFFSET, model=None, batch_size=MANY, **settings):
    return DiffusionTask(
        model or make_model(latents),
        latents,
        build_schedule(schedule, STREAMS),
        LossSettings(**settings),
        seed=3,
        batch_size=batch_size,
    )
