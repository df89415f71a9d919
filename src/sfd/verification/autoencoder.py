"""The texture autoencoder in LDM naming: moments and reconstruction of given images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sfd.convert.autoencoder import from_published, inferred_config, split_training_only
from sfd.utils.errors import SFDError
from sfd.verification._case import Case


def claims(folder: Path, name: str, values: Mapping[str, Any]) -> bool:
    """Whether the values are an LDM autoencoder's sizes, and no list of tensor names."""
    return "channel_multipliers" in values and "state_dict" not in values


@torch.no_grad()
def check(case: Case) -> None:
    """Encode the images and decode the posterior's mean."""
    state, left_out = split_training_only(case.weights())
    case.unchecked += left_out
    config = inferred_config({name: tuple(t.shape) for name, t in state.items()})
    check_sizes(case, config)
    network = from_published(state, config).to(case.device)
    io = case.references()
    posterior = network.encode(io.shaped("images", None, config["in_channels"], None, None)).latent_dist
    case.compare_if_there("mean", posterior.mean, io)
    case.compare_if_there("logvar", posterior.logvar, io)
    # The reference's own mean: a decoder with random weights makes much of the last bits of its input.
    mean = io.shaped("mean", *posterior.mean.shape) if "mean" in io else posterior.mean
    case.compare_if_there("reconstruction_from_mean", network.decode(mean).sample, io)
    case.unchecked += io.never_asked()


def check_sizes(case: Case, config: Mapping[str, Any]) -> None:
    """Refuse weights of other sizes than the case says.

    Raises:
        SFDError: names the first field that differs.
    """
    levels = config["block_out_channels"]
    given = {
        "channel_multipliers": [width / case.number("base_channels") for width in levels],
        "latent_channels": config["latent_channels"],
    }
    if "resolution" in case.values and "attention_resolutions" in case.values:
        sides = {case.number("resolution") // 2**i: kind for i, kind in enumerate(config["down_block_types"])}
        attention = [side for side, kind in sides.items() if kind.startswith("Attn")]
        given["attention_resolutions"] = attention
        if set(attention) == set(case.value("attention_resolutions")) & set(sides):
            given["attention_resolutions"] = case.value("attention_resolutions")
    for field, value in given.items():
        if case.value(field) != value:
            raise SFDError(f"{case.name}.json says {field} {case.value(field)}, but the weights have {value}")
