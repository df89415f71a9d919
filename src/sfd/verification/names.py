"""Names and shapes of every tensor in a published checkpoint: each must have its place here. No memory is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sfd.convert import autoencoder, semvae, transformer
from sfd.models.dit import parameter_count
from sfd.models.semvae import SemVAE
from sfd.utils.errors import SFDError
from sfd.verification import autoencoder as autoencoder_case
from sfd.verification import semvae as semvae_case
from sfd.verification._case import Case

Shapes = dict[str, tuple[int, ...]]


def claims(folder: Path, name: str, values: Mapping[str, Any]) -> bool:
    """Whether the values list a state dictionary."""
    return "state_dict" in values


def check(case: Case) -> None:
    """Build the network on the meta device from what the case says, and compare names, shapes and numbers of them."""
    where = f"{case.name}.json"
    given = _shapes(case, where)
    if "num_heads" in case.values or "x_embedder.proj.weight" in given:
        _transformer(case, given)
    elif "channel_multipliers" in case.values:
        config = autoencoder.inferred_config(given)
        autoencoder_case.check_sizes(case, config)
        case.compare_names(given, autoencoder.published_shapes(config))
        with torch.device("meta"):
            case.compare_count("parameters", _count(autoencoder.build(config, "meta")))
    elif "input_dim" in case.values:
        sizes = semvae_case.configuration(case)
        case.compare_names(given, semvae.published_shapes(sizes))
        with torch.device("meta"):
            model = SemVAE(sizes)
        case.compare_count("encoder_parameters", _count(model.encoder))
        case.compare_count("decoder_parameters", _count(model.decoder))
    else:
        raise SFDError(f"{where} lists tensors, but says of no network that is known here what its sizes are")


def _transformer(case: Case, given: Shapes) -> None:
    # How the channels divide into streams changes no published name or shape.
    semantic = 1 if "t_embedder_sem.mlp.0.weight" in given else 0
    config = transformer.inferred_config(given, semantic)
    sizes = {"depth": config.depth, "hidden_size": config.width, "num_heads": config.heads}
    for field, value in sizes.items():
        case.compare_count(field, value)
    case.compare_names(given, transformer.published_shapes(config))
    # The published count holds the fixed position embedding, which is no parameter here.
    fixed = config.composite.token_grid**2 * config.width
    case.compare_count("parameters", parameter_count(config) + fixed)


def _shapes(case: Case, where: str) -> Shapes:
    try:
        return {str(name): tuple(int(n) for n in shape) for name, shape in case.value("state_dict").items()}
    except (AttributeError, TypeError, ValueError):
        raise SFDError(f"{where}: 'state_dict' should map names to shapes, such as [64, 12, 1, 1]") from None


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
