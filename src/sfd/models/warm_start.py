"""Start a transformer from another one's weights, for fine-tuning on other classes, streams or sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfd.latents import CompositeLatent
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig
from sfd.utils.errors import SFDError

LABELS = "class_embedding.weight"


@torch.no_grad()
def warm_start(
    network: LightningDiT, source: LightningDiT, classes: Sequence[str], source_classes: Sequence[str]
) -> list[str]:
    """Copy every tensor of `source` that fits, streams matched by name.

    Of the class embedding, the null class and classes of equal names are copied; other classes start fresh.

    Args:
        network: is changed in place.
        source: on the same device.
        classes: names of the network's classes, in the order of their labels.
        source_classes: those of `source`.

    Returns:
        what starts fresh: names of tensors and, as "class NAME", of classes.
    """
    check_width(network.config, source.config)
    given, fresh = source.state_dict(), []
    for name, tensor in network.state_dict().items():
        before = given.get(_source_name(name, network.config, source.config) or "")
        if name == LABELS and before is not None and before.shape[1] == tensor.shape[1]:
            tensor[-1] = before[-1]
            for label, kind in enumerate(classes):
                if kind in source_classes:
                    tensor[label] = before[list(source_classes).index(kind)]
                else:
                    fresh.append(f"class {kind}")
        elif before is not None and before.shape == tensor.shape:
            tensor.copy_(before)
        else:
            fresh.append(name)
    return fresh


def check_width(config: DiTConfig, source: DiTConfig) -> None:
    """Refuse a source whose blocks do not fit; those of another depth do."""
    if (config.width, config.heads) != (source.width, source.heads):
        raise SFDError(
            f"the model to start from has width {source.width} and {source.heads} heads, but the recipe's transformer "
            f"has {config.width} and {config.heads}; set transformer.width={source.width} and "
            f"transformer.heads={source.heads}"
        )


def inherited(composite: CompositeLatent, source: CompositeLatent) -> CompositeLatent:
    """Give streams the statistics that `source` was trained with; latents must be made by the same tokenizers."""
    streams = []
    for stream in composite.streams:
        before = source[stream.name] if stream.name in source.names else None
        if before is None or (before.channels, before.grid) != (stream.channels, stream.grid):
            streams.append(stream)
            continue
        if "" not in (before.tokenizer, stream.tokenizer) and before.tokenizer != stream.tokenizer:
            raise SFDError(
                f"the {stream.name} latents were made by tokenizer {stream.tokenizer}, but the model to start from "
                f"knows those of {before.tokenizer}; set texture.folder, semantic.folder, compressor.folder"
            )
        streams.append(stream.model_copy(update={"mean": before.mean, "std": before.std}))
    return CompositeLatent(streams=tuple(streams))


def _source_name(name: str, config: DiTConfig, source: DiTConfig) -> str | None:
    """Name a tensor's counterpart: lists of modules by stream may be in another order, or lack the stream."""
    kind, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    streams = {
        "embeddings": (config.composite.names, source.composite.names),
        "heads": (config.composite.names, source.composite.names),
        "guide_heads": (config.composite.names, source.composite.names),
        "time_embedders": (config.clocks or ("",), source.clocks or ("",)),
    }
    if kind not in streams:
        return name
    if kind.endswith("heads") and config.prediction != source.prediction:
        return None  # they give something else
    ours, theirs = streams[kind]
    stream = ours[int(index)]
    return f"{kind}.{theirs.index(stream)}.{rest}" if stream in theirs else None
