"""A published transformer with what it needs to make images: a model directory.

A published checkpoint holds a network's weights alone. What else a model is, the caller says (texture encoder,
statistics, classes, offset); whatever the tensors' shapes and the checkpoint's configuration tell must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfd.convert import transformer as published
from sfd.convert.checkpoint import Checkpoint, plain
from sfd.data.published import KEYS, describe_published, read_statistics, statistics_files
from sfd.data.shards import MANIFEST, read_manifest
from sfd.encoders import TextureEncoder, open_texture
from sfd.generation.model import Model
from sfd.latents import TEXTURE, CompositeLatent, Stream
from sfd.models.component import assemble
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig
from sfd.schedule import build_schedule
from sfd.utils.errors import SFDError

DELTA = 0.3  # Δ of the published runs
REPA_BLOCK = 2  # of the published runs
NO_STATISTICS = "none"


@dataclass(frozen=True)
class Options:
    """What a published checkpoint does not record; None: not given."""

    texture: str | None  # texture encoder: a folder or a hub name
    statistics: tuple[str, ...]  # files, folders, or "none": latents that are not normalised
    classes: str | None  # a file with one name per line, or their number
    delta: float | None
    semantic_channels: int | None
    repa_block: int | None


def from_published(checkpoint: Checkpoint, options: Options, name: str) -> Model:
    """Build a model around a published checkpoint's weights; `name` is kept in its history."""
    if options.texture is None:
        raise SFDError("a model needs a texture encoder to make pixels: give --texture FOLDER or a hub name")
    if not options.statistics:
        raise SFDError(
            "a model needs the statistics that its latents were normalised with: give --statistics FILE or FOLDER "
            "(latents_stats.pt, latents_sv_stats.pt, or the folder of the latents); 'none' if they were not normalised"
        )
    texture = open_texture(options.texture)
    settings = _trained_with(checkpoint)
    config = _config(checkpoint, texture, options, settings)
    composite = _with_statistics(config.composite, options.statistics, texture)
    config = config.model_copy(update={"composite": composite})
    network = assemble(lambda: LightningDiT(config), published.from_published(checkpoint.tensors, config), name)
    schedule = build_schedule(_schedule(config, options.delta, settings), composite.names)
    history = {"converted from": name, "weights": checkpoint.state or "the only ones"}
    return Model(network, schedule, texture, _classes(config, options.classes), history)


def _trained_with(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Find the `model` section of the configuration that the published trainer keeps in a checkpoint."""
    config = plain(checkpoint.others.get("config"))
    model = config.get("model") if isinstance(config, dict) else None
    return model if isinstance(model, dict) else {}


def _agreed(option: str, given: Any, settings: Mapping[str, Any], field: str, default: Any) -> Any:
    stated = settings.get(field)
    if None not in (given, stated) and given != stated:
        raise SFDError(f"{option} is {given}, but the checkpoint was trained with {field} = {stated}; leave it out")
    return next((value for value in (given, stated) if value is not None), default)


def _config(
    checkpoint: Checkpoint, texture: TextureEncoder, options: Options, settings: Mapping[str, Any]
) -> DiTConfig:
    shapes = checkpoint.shapes
    if len(shapes[published.EMBEDDING]) != 4:
        raise SFDError(f"this is not a published transformer: {published.EMBEDDING} is {shapes[published.EMBEDDING]}")
    channels = shapes[published.EMBEDDING][1]
    semantic = channels - texture.channels
    stated = _agreed("--semantic-channels", options.semantic_channels, settings, "semantic_chans", semantic)
    if semantic < 0 or stated != semantic:
        raise SFDError(
            f"the checkpoint has {channels} channels, {stated} of them semantic, but the texture encoder "
            f"{options.texture} has {texture.channels}; give the texture encoder that it was trained with"
        )
    block = _agreed("--repa-block", options.repa_block, settings, "repa_feat_depth", REPA_BLOCK)
    return published.inferred_config(shapes, semantic, block)


def _schedule(config: DiTConfig, given: float | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    delta = _agreed("--delta", given, settings, "semfirst_delta_t", DELTA if config.clocks else 0.0)
    if config.clocks:
        return {"name": "offset", "delta": delta}
    if delta:
        raise SFDError(f"the offset is {delta}, but this network has one time embedding for all streams; use --delta 0")
    return {"name": "synchronous"}


def _classes(config: DiTConfig, given: str | None) -> tuple[str, ...]:
    count = config.num_classes
    if given is None or given.isdecimal():
        names = [str(i) for i in range(count if given is None else int(given))]
    else:
        try:
            names = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise SFDError(f"--classes {given} should be a number or a file with one name per line ({error})") from None
    if len(names) != count:
        plain = (
            "; networks that were trained without label dropout are not supported" if len(names) == count + 1 else ""
        )
        raise SFDError(
            f"--classes gives {len(names)} classes, but the checkpoint has {count} and the null class{plain}"
        )
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
            raise SFDError(f"--statistics {' '.join(sources)} has none of {', '.join(missing)}; give them too")
    streams = []
    for stream in composite.streams:
        tokenizer = {"tokenizer": texture.identity} if stream.name == TEXTURE else {}
        streams.append(Stream.model_validate({**stream.model_dump(), **tokenizer, **found.get(stream.name, {})}))
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
    if path.is_dir():
        stated = statistics_files(path)
    else:
        stated = {name: path for name, key in KEYS.items() if path.name.startswith(f"{key}_stats")}
    pairs = {s: read_statistics(p, composite[s].channels) for s, p in stated.items() if s in composite.names}
    if not pairs:
        raise SFDError(
            f"--statistics {source} holds neither latents nor latents_stats.pt (texture), latents_sv_stats.pt "
            "(semantic); give their file or folder"
        )
    return {name: {"mean": tuple(m.tolist()), "std": tuple(d.tolist())} for name, (m, d) in pairs.items()}
