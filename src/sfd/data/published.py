"""Latent shards as the published data set stores them: opened in place, described as ours are, and written.

A folder of safetensors files, in the order of their names. Each holds `latents` and `latents_flip` (texture),
`latents_sv` and `latents_sv_flip` (semantic), perhaps `feats_dino` and `feats_dino_flip` (features for REPA), and
`labels`. `latents_stats.pt` and `latents_sv_stats.pt` beside them hold each channel's mean and standard deviation, each
(1, C, 1, 1); where there are none, they are computed of all latents that are not flipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfd.data.images import stable_hash
from sfd.data.shards import FEATURES, FLIP, FORMAT, LatentSet, Manifest, ShardRecord, StreamRecord
from sfd.data.statistics import ChannelStatistics
from sfd.utils import files
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar

KEYS = {"texture": "latents", "semantic": "latents_sv", FEATURES: "feats_dino"}
LABELS = "labels"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INTEGERS = ("I64", "I32", "I16", "U8")
# Images that are looked at to tell whether statistics from a file are those of the latents, and how far off is wrong.
_SAMPLE = 256
_FARTHEST_MEAN, _LARGEST_RATIO = 1.0, 2.0
_ROWS = 1024  # images that statistics are computed of, or that are written, at a time


class Entry(NamedTuple):
    """What a shard's header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


class Shard(NamedTuple):
    """What a shard's header says, and its size."""

    path: Path
    entries: Mapping[str, Entry]
    size: int

    @property
    def images(self) -> int:
        """How many images it holds."""
        return self.entries[LABELS].shape[0]

    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each tensor, but for the number of images."""
        return {name: (entry.dtype, entry.shape[1:]) for name, entry in sorted(self.entries.items())}


def open_published(
    folder: Path, *, tokenizers: Mapping[str, str] | None = None, classes: int | None = None
) -> LatentSet:
    """Open published shards where they lie; nothing is written. See `describe_published`."""
    return LatentSet(folder, describe_published(folder, tokenizers=tokenizers, classes=classes))


def describe_published(
    folder: Path, *, tokenizers: Mapping[str, str] | None = None, classes: int | None = None
) -> Manifest:
    """Check published shards and say what they are, as `manifest.json` does of our own.

    Only headers, labels and a few images are read, but for statistics that no file gives.

    Args:
        folder: where the shards lie.
        tokenizers: the identity of what made a stream, where it is known.
        classes: their number; None: the largest label and one.

    Raises:
        SFDError: a shard is damaged, lacks a tensor or differs from the others; statistics that are unusable, or those
            of other latents.
    """
    shards = read_shards(folder)
    streams = [name for name, key in KEYS.items() if name != FEATURES and key in shards[0].entries]
    entries = {name: shards[0].entries[KEYS[name]] for name in streams}
    given = {name: read_statistics(path, entries[name].shape[1]) for name, path in statistics_files(folder).items()}
    computed = _compute_statistics(shards, [name for name in streams if name not in given])
    features = shards[0].entries.get(KEYS[FEATURES])
    manifest = Manifest(
        format=FORMAT,
        data=identity(folder),
        count=sum(shard.images for shard in shards),
        classes=_classes(shards, classes),
        dtype=FLOATS[entries["texture"].dtype],
        streams={
            name: StreamRecord(
                channels=entry.shape[1],
                grid=entry.shape[2],
                mean=tuple((given | computed)[name][0].tolist()),
                std=tuple((given | computed)[name][1].tolist()),
                tokenizer=(tokenizers or {}).get(name, ""),
            )
            for name, entry in entries.items()
        },
        features=features
        and {
            "channels": features.shape[1],
            "grid": features.shape[2],
            "dtype": FLOATS[features.dtype],
            "tokenizer": (tokenizers or {}).get(FEATURES, ""),
        },
        shards=tuple(ShardRecord(file=s.path.name, count=s.images, bytes=s.size, sha256=None) for s in shards),
        keys=KEYS,
    )
    for name in given:
        _check_fit(LatentSet(folder, manifest), name, statistics_files(folder)[name])
    return manifest


def read_shards(folder: Path) -> list[Shard]:
    """Read the headers of all shards, in the order of their names, and check that they agree.

    Raises:
        SFDError: there are none; one is damaged, lacks a tensor, or is of another shape or type than the first.
    """
    if not folder.is_dir():
        raise SFDError(f"there is no folder {folder}; give the one that holds the published latents (*.safetensors)")
    shards = [_read_shard(path) for path in sorted(folder.glob("*.safetensors"))]
    if not shards:
        raise SFDError(f"{folder} holds no *.safetensors file; give the folder of the published latents")
    first = shards[0].kinds()
    for shard in shards[1:]:
        for name in sorted({*first, *shard.kinds()}):
            ours, theirs = first.get(name), shard.kinds().get(name)
            if ours != theirs:
                raise SFDError(
                    f"{shards[0].path} and {shard.path.name} do not belong together: {name} is {_kind(ours)} in the "
                    f"first and {_kind(theirs)} in the second; keep the shards of one data set in a folder"
                )
    return shards


def _kind(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} {'×'.join(map(str, kind[1])) or 'a number'} an image"


def _read_shard(path: Path) -> Shard:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            entries = {name: Entry(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        raise SFDError(f"{path} is damaged ({error}); fetch or make it again") from None
    except OSError as error:
        raise files.as_user_error(error, path) from None
    streams = [KEYS["texture"], *(key for key in list(KEYS.values())[1:] if key in entries or key + FLIP in entries)]
    for name in (*(key + suffix for key in streams for suffix in ("", FLIP)), LABELS):
        if name not in entries:
            raise SFDError(
                f"{path} lacks {name!r} (it holds {', '.join(sorted(entries)) or 'nothing'}); a published shard has "
                "each stream in both orientations, NAME and NAME_flip, and labels; extract it again"
            )
    _check_entries(path, entries, streams)
    return Shard(path, entries, path.stat().st_size)


def _check_entries(path: Path, entries: Mapping[str, Entry], streams: list[str]) -> None:
    labels = entries[LABELS]
    if len(labels.shape) != 1 or labels.dtype not in INTEGERS or labels.shape[0] == 0:
        raise SFDError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; expected one integer an image")
    for key in streams:
        entry, flipped = entries[key], entries[key + FLIP]
        if entry != flipped:
            raise SFDError(f"{path}: {key} is {entry.dtype} {list(entry.shape)}, but {key + FLIP} is {flipped.dtype} "
                           f"{list(flipped.shape)}; extract the shard again")  # fmt: skip
        if entry.dtype not in FLOATS or len(entry.shape) != 4 or entry.shape[2] != entry.shape[3] or 0 in entry.shape:
            expected = "floating-point numbers (images, channels, grid, grid)"
            raise SFDError(f"{path}: {key} is {entry.dtype} {list(entry.shape)}; expected {expected}")
        if entry.shape[0] != labels.shape[0]:
            raise SFDError(
                f"{path}: {key} holds {entry.shape[0]} images, but labels {labels.shape[0]}; extract the shard again"
            )


def identity(folder: Path) -> str:
    """Hash what the shards are: names, sizes and labels, and each one's first and last image in full."""
    probes = []
    for path in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(files.read_tensors(path).items()):
            part = tensor if name == LABELS else tensor[[0, -1]] if len(tensor) else tensor
            digest.update(name.encode() + str(tuple(tensor.shape)).encode() + part.view(torch.uint8).numpy().tobytes())
        probes.append((path.name, path.stat().st_size, digest.hexdigest()))
    return stable_hash("published latents", shards=probes)


def _classes(shards: list[Shard], given: int | None) -> tuple[str, ...]:
    """Number the classes; all labels 0 are none."""
    largest = 0
    for shard in shards:
        labels = files.read_tensors(shard.path)[LABELS]
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (given is not None and high >= given):
            raise SFDError(
                f"{shard.path}: labels lie between {low} and {high}, but should between 0 and "
                f"{'the number of classes' if given is None else given - 1}; set data.classes, or mend the shard"
            )
        largest = max(largest, high)
    count = largest + 1 if given is None else given
    return tuple(map(str, range(count))) if count > 1 else ()


def statistics_files(folder: Path) -> dict[str, Path]:
    """Find the file with each stream's statistics, where there is one: `latents_stats.pt`, `latents_sv_stats.pt`.

    Raises:
        SFDError: there are several for one stream.
    """
    found = {}
    for name, key in KEYS.items():
        paths = sorted(folder.glob(f"{key}_stats*.pt"))
        if len(paths) > 1:
            raise SFDError(f"{folder} holds {paths[0].name} and {paths[1].name}; leave the right statistics alone")
        if paths and name != FEATURES:
            found[name] = paths[0]
    return found


def read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Read mean and standard deviation of a stream's channels, (C,) float64 each, from a published `*_stats.pt`.

    Raises:
        SFDError: the file is missing, damaged, carries code, or holds no usable statistics of so many channels.
    """
    values = files.read_pickled(path)
    mend = "; fetch the file of these latents, or remove it to have the statistics computed"
    if not isinstance(values, dict) or not all(isinstance(values.get(k), Tensor) for k in ("mean", "std")):
        raise SFDError(f"{path} holds no tensors 'mean' and 'std'{mend}")
    mean, std = (values[k].detach().double() for k in ("mean", "std"))
    for label, tensor in (("mean", mean), ("std", std)):
        if tensor.numel() != channels or max(tensor.shape, default=0) != channels:
            raise SFDError(f"{path}: {label} is {list(tensor.shape)}, but the latents have {channels} channels{mend}")
    if not torch.isfinite(mean).all() or not torch.isfinite(std).all() or not (std > 0).all():
        raise SFDError(f"{path}: some mean is not finite, or some std is not positive and finite{mend}")
    return mean.flatten(), std.flatten()


def _compute_statistics(shards: list[Shard], streams: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute each channel's mean and unbiased standard deviation over all latents that are not flipped."""
    found = {}
    for name in streams:
        statistics = ChannelStatistics(shards[0].entries[KEYS[name]].shape[1])
        with bar(f"statistics of {name}", sum(shard.images for shard in shards)) as shown:
            for shard in shards:
                for rows in files.read_tensors(shard.path)[KEYS[name]].split(_ROWS):
                    statistics.add(rows)
                    shown.advance(len(rows))
                if not torch.isfinite(statistics.std).all():
                    raise SFDError(f"{shard.path}: {KEYS[name]} holds values that are not finite; extract it again")
        if not (statistics.std > 0).all():
            channel = int(statistics.std.argmin())
            raise SFDError(f"{shards[0].path.parent}: channel {channel} of {KEYS[name]} is the same everywhere, so it "
                           "cannot be normalised; extract the latents again")  # fmt: skip
        found[name] = (statistics.mean, statistics.std)
    return found


def _check_fit(latents: LatentSet, name: str, path: Path) -> None:
    """Refuse statistics of other latents, with which a model would be trained on, and decode, the wrong values."""
    indices = np.unique(np.linspace(0, len(latents) - 1, _SAMPLE).astype(np.int64))
    record = latents.manifest.streams[name]
    mean, std = (torch.tensor(values)[:, None, None] for values in (record.mean, record.std))
    statistics = ChannelStatistics(record.channels)
    statistics.add((latents.read(name, indices, np.zeros(len(indices), bool)) - mean) / std)
    off, spread = statistics.mean.abs().max().item(), statistics.std
    if not (off <= _FARTHEST_MEAN and spread.min() >= 1 / _LARGEST_RATIO and spread.max() <= _LARGEST_RATIO):
        raise SFDError(
            f"{path} is not of these latents: normalised with it, means are up to {off:.2g} from 0 and standard "
            f"deviations {spread.min():.2g} to {spread.max():.2g} in place of 1; fetch the right file, or remove it to "
            "have the statistics computed"
        )


def write_published(latents: LatentSet, out: Path, shard_size: int) -> None:
    """Write latents as published shards, with their statistics beside them; readable here and by the published code.

    Args:
        latents: any; other streams than texture and semantic have no place there.
        out: a new folder, whole or not there.
        shard_size: images a shard.

    Raises:
        SFDError: `out` holds something, or a stream has no place in the format.
    """
    for name in latents.manifest.streams:
        if name not in KEYS:
            raise SFDError(f"published latents hold the streams texture and semantic, but here is {name!r}; leave it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SFDError(f"{out} exists already; give a new folder")
    names = [*latents.manifest.streams, *([FEATURES] if latents.manifest.features else [])]
    starts = range(0, len(latents), shard_size)
    digits = max(3, len(str(len(starts) - 1)))  # so that names sort as numbers do
    with files.atomic_write(out) as partial, bar("writing shards", len(latents)) as shown:
        partial.mkdir()
        for number, start in enumerate(starts):
            indices = np.arange(start, min(start + shard_size, len(latents)))
            tensors = {LABELS: latents.labels[start : start + shard_size]}
            for name in names:
                dtype = torch.float16 if name == FEATURES else torch.float32
                for suffix in ("", FLIP):
                    flips = np.full(len(indices), suffix == FLIP)
                    tensors[KEYS[name] + suffix] = latents.read(name, indices, flips).to(dtype)
            files.write_tensors(partial / f"latents_rank00_shard{number:0{digits}d}.safetensors", tensors)
            shown.advance(len(indices))
        for name, record in latents.manifest.streams.items():
            shape = (1, record.channels, 1, 1)
            statistics = {"mean": torch.tensor(record.mean).view(shape), "std": torch.tensor(record.std).view(shape)}
            torch.save(statistics, partial / f"{KEYS[name]}_stats.pt")
