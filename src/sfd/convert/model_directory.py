"""A published transformer with what it needs to make images: a model that samples; and its weights back.

A published checkpoint holds a network's weights alone. What else a model is, the caller says (texture encoder,
statistics, classes, offset); whatever the tensors' shapes tell is read from them and must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfd.convert import transformer as published
from sfd.convert.checkpoint_files import Checkpoint
from sfd.data.published import KEYS, describe_published, read_statistics, statistics_files
from sfd.data.shards import MANIFEST, read_manifest
from sfd.encoders import TextureEncoder, open_texture
from sfd.generation.model import TEXTURE_STREAM, Model
from sfd.latents import CompositeLatent, Stream
from sfd.models.dit import DiTConfig, LightningDiT
from sfd.schedules import build_schedule
from sfd.utils import files
from sfd.utils.errors import SFDError

DELTA = 0.3  # Δ of the published runs
REPA_BLOCK = 2  # of the published runs
NO_STATISTICS = "none"


@dataclass(frozen=True)
class Options:
    """What a published checkpoint does not say of itself; None where nobody says anything."""

    texture: str | None  # texture encoder: a folder or a hub name
    statistics: tuple[str, ...]  # files, folders, or "none": latents that are not normalised
    classes: str | None  # a file with a name a line, or their number
    delta: float | None
    semantic_channels: int | None
    repa_block: int | None


def to_published(model: Model) -> dict[str, Tensor]:
    """Give the transformer's tensors as a published checkpoint has them.

    Raises:
        SFDError: the published network cannot hold this composite.
    """
    return published.to_published(model.transformer.state_dict(), model.transformer.config)


def from_published(checkpoint: Checkpoint, options: Options, name: str) -> Model:
    """Build a model around a published checkpoint's weights; `name` is kept in its history.

    Raises:
        SFDError: something that is needed is not given, or does not fit the checkpoint.
    """
    if options.texture is None:
        raise SFDError("a model needs a texture encoder to make pixels: give --texture FOLDER or a hub name")
    if not options.statistics:
        raise SFDError(
            "a model needs the statistics that its latents were normalised with: give --statistics FILE or FOLDER "
            "(latents_stats.pt, latents_sv_stats.pt, or the folder of the latents); 'none' if they were not normalised"
        )
    texture = open_texture(options.texture)
    given = _given_config(checkpoint)
    config = _config(checkpoint, texture, options, given)
    composite = _with_statistics(config.composite, options.statistics, texture)
    config = config.model_copy(update={"composite": composite})
    network = LightningDiT(config)
    network.load_state_dict(published.from_published(checkpoint.tensors, config))
    schedule = build_schedule(_schedule(config, options.delta, given), composite.names)
    history = {"converted from": name, "weights": checkpoint.state or "the only ones"}
    return Model(network.eval().requires_grad_(False), schedule, texture, _classes(config, options.classes), history)


def _given_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Find the published network's configuration beside its weights; a training script's other settings are none."""
    config = checkpoint.others.get("config")
    return config if isinstance(config, dict) and "hidden_size" in config else None


def _config(
    checkpoint: Checkpoint, texture: TextureEncoder, options: Options, given: Mapping[str, Any] | None
) -> DiTConfig:
    shapes = checkpoint.shapes
    if len(shapes[published.EMBEDDING]) != 4:
        raise SFDError(f"this is no published transformer: {published.EMBEDDING} is {shapes[published.EMBEDDING]}")
    channels = shapes[published.EMBEDDING][1]
    semantic = channels - texture.channels
    if semantic < 0 or options.semantic_channels not in (None, semantic):
        asked = "" if options.semantic_channels is None else f" and {options.semantic_channels} semantic ones"
        raise SFDError(
            f"the checkpoint has {channels} channels, which are not the {texture.channels} of the texture encoder "
            f"{options.texture}{asked}; give the texture encoder that it was trained with"
        )
    stated = published.published_config(given) if given else None
    block = options.repa_block or (stated.repa_block if stated else None) or REPA_BLOCK
    config = published.inferred_config(shapes, semantic, block)
    for field, value in stated or ():
        if value != getattr(config, field):
            raise SFDError(
                f"the checkpoint's own configuration says {field} = {files.jsonable(_dumped(value))}, but its tensors "
                f"and the options say {files.jsonable(_dumped(getattr(config, field)))}"
            )
    return config


def _dumped(value: Any) -> Any:
    return value.model_dump() if isinstance(value, CompositeLatent) else value


def _schedule(config: DiTConfig, delta: float | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given and delta not in (None, given["semfirst_delta_t"]):
        raise SFDError(f"--delta is {delta}, but the checkpoint says semfirst_delta_t = {given['semfirst_delta_t']}")
    if not config.clocks:
        if delta:
            raise SFDError(f"--delta is {delta}, but this network has one clock for all streams, so it knows no offset")
        return {"name": "synchronous"}
    return {"name": "offset", "delta": given["semfirst_delta_t"] if given else DELTA if delta is None else delta}


def _classes(config: DiTConfig, given: str | None) -> tuple[str, ...]:
    count = config.num_classes
    if given is None or given.isdecimal():
        names = [str(i) for i in range(count if given is None else int(given))]
    else:
        try:
            names = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise SFDError(f"--classes {given} should be a number or a file with a name a line ({error})") from None
    if len(names) == count + 1:
        raise SFDError(
            f"the checkpoint has {count + 1} class embeddings, one for each of {len(names)} classes and none for no "
            "class; networks that were trained without label dropout are not supported"
        )
    if len(names) != count:
        raise SFDError(f"--classes gives {len(names)} classes, but the checkpoint has {count} and the null class")
    if len(set(names)) != len(names):
        raise SFDError(f"--classes {given}: two classes have the same name; give each its own")
    return tuple(names)


def _with_statistics(composite: CompositeLatent, sources: tuple[str, ...], texture: TextureEncoder) -> CompositeLatent:
    """Give every stream its statistics, and the texture stream the identity of its encoder."""
    found: dict[str, dict[str, Any]] = {}
    if sources != (NO_STATISTICS,):
        for source in sources:
            found |= _statistics(source, composite)
        missing = [name for name in composite.names if name not in found]
        if missing:
            raise SFDError(
                f"--statistics {' '.join(sources)} has none of the stream {', '.join(missing)}; give them too"
            )
    tokenizer = {"tokenizer": texture.identity}
    streams = [
        Stream.model_validate(
            {**s.model_dump(), **(tokenizer if s.name == TEXTURE_STREAM else {}), **found.get(s.name, {})}
        )
        for s in composite.streams
    ]
    return CompositeLatent(streams=tuple(streams))


def _statistics(source: str, composite: CompositeLatent) -> dict[str, dict[str, Any]]:
    """Read from a folder of latents, of ours or published, or from a file: stream → mean, std, perhaps tokenizer."""
    path = Path(source)
    if not path.exists():
        raise SFDError(f"--statistics {source}: there is no such file or folder; 'none' means unnormalised latents")
    if (path / MANIFEST).exists() or any(path.glob("*.safetensors")):
        ours = (path / MANIFEST).exists()
        records = (read_manifest(path) if ours else describe_published(path)).streams
        for name in composite.names:
            if name in records and records[name].channels != composite[name].channels:
                raise SFDError(
                    f"{source}: its {name} latents have {records[name].channels} channels, but the network's have "
                    f"{composite[name].channels}; give the latents that it was trained on"
                )
        values = {name: record.model_dump(include={"mean", "std", "tokenizer"}) for name, record in records.items()}
        return {name: {key: v for key, v in value.items() if v} for name, value in values.items()}
    stated = statistics_files(path) if path.is_dir() else {_stream_of(path): path}
    pairs = {s: read_statistics(p, composite[s].channels) for s, p in stated.items() if s in composite.names}
    if not pairs:
        raise SFDError(f"--statistics {source} holds neither latents nor latents_stats.pt; give their file or folder")
    return {name: {"mean": tuple(m.tolist()), "std": tuple(d.tolist())} for name, (m, d) in pairs.items()}


def _stream_of(path: Path) -> str:
    for name, key in KEYS.items():
        if path.name.startswith(f"{key}_stats"):
            return name
    raise SFDError(f"--statistics {path}: the file's name says whose they are; call it latents_stats.pt (texture) or "
                   "latents_sv_stats.pt (semantic)")  # fmt: skip
