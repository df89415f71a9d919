"""The semantic VAE: moments, KL, reconstruction and losses of given features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd.convert.semvae import from_published
from sfd.models.semvae import SemVAEConfig, reconstruction_losses
from sfd.utils.config import parse
from sfd.verification._case import Case

FIELDS = {
    "input_dim": "input_channels",
    "latent_dim": "latent_channels",
    "hidden_dim": "width",
    "heads": "heads",
    "blocks": "blocks",
}


def claims(folder: Path, name: str, values: Mapping[str, Any]) -> bool:
    """Whether the values are a SemVAE's sizes, and no list of tensor names."""
    return values.keys() >= {"input_dim", "latent_dim"} and "state_dict" not in values


def configuration(case: Case) -> SemVAEConfig:
    """Read the sizes."""
    values = {ours: case.value(theirs) for theirs, ours in FIELDS.items()}
    return parse(SemVAEConfig, values, f"{case.name}.json")


@torch.no_grad()
def check(case: Case) -> None:
    """Encode the features and decode the posterior's mean."""
    config = configuration(case)
    model = from_published(case.weights(), config).to(case.device)
    io = case.references()
    mean = io.shaped("mean", None, config.latent_channels, None, None)
    height, width = mean.shape[2:]
    tokens = io.shaped("features", len(mean), height * width, config.input_channels)
    features = tokens.transpose(1, 2).unflatten(2, (height, width))
    moments = model.moments(features)
    reconstruction = model.decode(mean)  # the reference's own
    mse, cosine = reconstruction_losses(reconstruction, features)
    ours: dict[str, Tensor] = {
        "mean": moments.mean,
        "logvar": moments.logvar,
        "kl_per_image": moments.kl(),
        "reconstruction_from_mean": reconstruction.flatten(2).transpose(1, 2),
        "mse": mse,
        "cosine_loss_last_dim": cosine,
        "cosine_loss": reconstruction_losses(reconstruction, features, "tokens")[1],
    }
    for quantity, value in ours.items():
        case.compare_if_there(quantity, value, io)
    case.compare_count("params", sum(p.numel() for p in model.parameters()))
    case.unchecked += io.never_asked()
