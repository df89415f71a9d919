"""Latent shards in the published format: opened in place, with a manifest like that of encoded ones, and written.

A folder of safetensors files, in the order of their names. Each holds `latents` and `latents_flip` (texture), perhaps
`latents_sv` and `latents_sv_flip` (semantic) and `feats_dino` and `feats_dino_flip` (features for REPA), and `labels`.
`latents_stats.pt` and `latents_sv_stats.pt` hold mean and standard deviation per channel, each (1, C, 1, 1); where they
are absent, they are computed over all latents that are not flipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from sfd.data import shards
from sfd.data.images import stable_hash
from sfd.data.shards import FEATURES, FLIP, FLOATS, LABELS, Header, LatentSet, Manifest, build_manifest
from sfd.data.statistics import ChannelStatistics
from sfd.encoders import TextureEncoder
from sfd.latents import SEMANTIC, TEXTURE
from sfd.utils import files
from sfd.utils.errors import SFDError
from sfd.utils.progress import bar

KEYS = {TEXTURE: "latents", SEMANTIC: "latents_sv", FEATURES: "feats_dino"}
INTEGERS = ("I64", "I32", "I16", "U8")
# Images that show whether a file's statistics are those of the latents, and how far off is wrong.
_SAMPLE = 256
_FARTHEST_MEAN, _LARGEST_RATIO = 1.0, 2.0
_ROWS = 1024  # images read at a time


@dataclass(frozen=True)
class PublishedLatents:
    """Published shards that a run uses instead of its own: it keeps their manifest, with the statistics.

    Args:
        source: folder of the shards.
        texture: the encoder that made the texture stream, as far as the recipe vouches for it.
        classes: their number; None: the largest label and one.
        folder: where the manifest is written.
    """

    source: Path
    texture: TextureEncoder
    classes: int | None
    folder: Path

    def inputs(self) -> dict[str, Any]:
        """What the latents are."""
        return {
            "published": identity(self.source),
            "statistics": {name: files.checksum(path) for name, path in statistics_files(self.source).items()},
            "tokenizers": {TEXTURE: self.texture.identity},
        }

    def write(self) -> None:
        """Check the shards and write their manifest."""
        tokenizers = {TEXTURE: self.texture.identity}
        manifest = describe_published(self.source, tokenizers=tokenizers, classes=self.classes)
        files.write_json(self.folder / shards.MANIFEST, manifest.model_dump(mode="json"))


def describe_published(
    folder: Path, *, tokenizers: Mapping[str, str] | None = None, classes: int | None = None
) -> Manifest:
    """Check published shards and build their manifest.

    Reads headers, labels and a few images only, except for statistics that no file gives.

    Args:
        folder: of the shards.
        tokenizers: the identity of what made a stream, where it is known.
        classes: their number; None: the largest label and one.
    """
    headers, paths = read_shards(folder), statistics_files(folder)

    def statistics(name: str, channels: int) -> tuple[Tensor, Tensor]:
        return read_statistics(paths[name], channels) if name in paths else _compute_statistics(headers, name)

    names = _classes(headers, classes)
    manifest = build_manifest(headers, statistics, tokenizers or {}, identity(folder), names, KEYS)
    for name, path in paths.items():
        _check_statistics(LatentSet(folder, manifest), name, path)
    return manifest


def read_shards(folder: Path) -> list[Header]:
    """Read the headers of all shards, in the order of their names, and check that they agree."""
    if not folder.is_dir():
        raise SFDError(f"there is no folder {folder}; give the one that holds the published latents (*.safetensors)")
    headers = [_read_shard(path) for path in sorted(folder.glob("*.safetensors"))]
    if not headers:
        raise SFDError(f"{folder} holds no *.safetensors file; give the folder of the published latents")
    first = headers[0]
    for header in headers[1:]:
        for name in sorted({*first.entries, *header.entries}):
            ours, theirs = _per_image(first, name), _per_image(header, name)
            if ours != theirs:
                raise SFDError(
                    f"{first.path} and {header.path.name} do not belong together: {name} is {ours} in the first and "
                    f"{theirs} in the second; keep the shards of one data set in a folder"
                )
    return headers


def _per_image(shard: Header, name: str) -> str:
    if name not in shard.entries:
        return "absent"
    dtype, shape = shard.entries[name]
    return f"{dtype} {'×'.join(map(str, shape[1:])) or 'a number'} per image"


def _read_shard(path: Path) -> Header:
    try:
        shard = shards.read_header(path)
    except SafetensorError as error:
        reason = files.failed_download(path) or f"damaged ({error}); fetch or make it again"
        raise SFDError(f"{path} is {reason}") from None
    entries = shard.entries
    streams = [key for key in KEYS.values() if key == KEYS[TEXTURE] or {key, key + FLIP} & entries.keys()]
    for name in (*streams, *(key + FLIP for key in streams), LABELS):
        if name not in entries:
            raise SFDError(
                f"{path} lacks {name!r} (it holds {', '.join(sorted(entries)) or 'nothing'}); a published shard has "
                "each stream in both orientations, NAME and NAME_flip, and labels; extract it again"
            )
    dtype, shape = entries[LABELS]
    if len(shape) != 1 or dtype not in INTEGERS or shape[0] == 0:
        raise SFDError(f"{path}: labels are {dtype} {list(shape)}; expected one integer per image")
    for key in streams:
        dtype, shape = entries[key]
        if dtype not in FLOATS or len(shape) != 4 or shape[2] != shape[3] or 0 in shape or shape[0] != shard.count:
            raise SFDError(
                f"{path}: {key} is {dtype} {list(shape)}; expected floating-point numbers ({shard.count}, channels, "
                "grid, grid), as many as there are labels"
            )
        if entries[key + FLIP] != entries[key]:
            raise SFDError(f"{path}: {key} and {key + FLIP} differ in type or shape; extract the shard again")
    return shard


def identity(folder: Path) -> str:
    """Hash names, sizes and labels of the shards, and the first and last image of each."""
    probes = []
    for path in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(files.read_tensors(path).items()):
            whole = name == LABELS or tensor.numel() == 0 or tensor.dim() == 0
            content = (tensor if whole else tensor[[0, -1]]).reshape(-1).view(torch.uint8).numpy().tobytes()
            digest.update(name.encode() + str(tuple(tensor.shape)).encode() + content)
        probes.append((path.name, path.stat().st_size, digest.hexdigest()))
    return stable_hash("published latents", shards=probes)


def _classes(headers: list[Header], given: int | None) -> tuple[str, ...]:
    """Number the classes; if all labels are 0, there are none."""
    largest = 0
    for header in headers:
        labels = files.read_tensors(header.path)[LABELS]
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (given is not None and high >= given):
            below = "the number of classes" if given is None else given
            raise SFDError(
                f"{header.path}: labels are between {low} and {high}, but should be at least 0 and below {below}; set "
                "data.classes, or mend the shard"
            )
        largest = max(largest, high)
    count = largest + 1 if given is None else given
    return tuple(map(str, range(count))) if count > 1 else ()


def statistics_files(folder: Path) -> dict[str, Path]:
    """Find the file with each stream's statistics, where there is one: `latents_stats.pt`, `latents_sv_stats.pt`."""
    found = {}
    for name in (TEXTURE, SEMANTIC):
        paths = sorted(folder.glob(f"{KEYS[name]}_stats*.pt"))
        if len(paths) > 1:
            raise SFDError(f"{folder} holds {paths[0].name} and {paths[1].name}; keep the right one only")
        if paths:
            found[name] = paths[0]
    return found


def read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Read mean and standard deviation of a stream's channels, (C,) float64 each, from a published `*_stats.pt`."""
    values = files.read_pickled(path)
    mend = "; fetch the file of these latents, or remove it to have the statistics computed"
    if not isinstance(values, dict) or not all(isinstance(values.get(k), Tensor) for k in ("mean", "std")):
        raise SFDError(f"{path} holds no tensors 'mean' and 'std'{mend}")
    mean, std = (values[k].detach().double() for k in ("mean", "std"))
    for label, tensor in (("mean", mean), ("std", std)):
        if tensor.numel() != channels or max(tensor.shape, default=0) != channels:
            raise SFDError(f"{path}: {label} is {list(tensor.shape)}, but the latents have {channels} channels{mend}")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise SFDError(f"{path}: some mean is not finite, or some std is not positive and finite{mend}")
    return mean.flatten(), std.flatten()


def _compute_statistics(headers: list[Header], name: str) -> tuple[Tensor, Tensor]:
    """Compute mean and unbiased standard deviation per channel, (C,) each, over all latents that are not flipped."""
    key = KEYS[name]
    statistics = ChannelStatistics(headers[0].entries[key].shape[1])
    with bar(f"statistics of {name}", sum(header.count for header in headers)) as shown:
        for header in headers:
            for rows in files.read_tensors(header.path)[key].split(_ROWS):
                statistics.add(rows)
                shown.update(len(rows))
            if not torch.isfinite(statistics.std).all():
                raise SFDError(f"{header.path}: {key} holds values that are not finite; extract it again")
    if not (statistics.std > 0).all():
        where, channel = headers[0].path.parent, int(statistics.std.argmin())
        raise SFDError(f"{where}: channel {channel} of {key} is constant, so it cannot be normalised; extract it again")
    return statistics.mean, statistics.std


def _check_statistics(latents: LatentSet, name: str, path: Path) -> None:
    """Refuse statistics of other latents, with which a model would be trained on, and decode, the wrong values."""
    indices = np.unique(np.linspace(0, len(latents) - 1, _SAMPLE).astype(np.int64))
    record = latents.manifest.streams[name]
    mean, std = (torch.tensor(values)[:, None, None] for values in (record.mean, record.std))
    statistics = ChannelStatistics(record.channels)
    statistics.add((latents.read(name, indices, np.zeros(len(indices), bool)) - mean) / std)
    off, low, high = statistics.mean.abs().max().item(), statistics.std.min().item(), statistics.std.max().item()
    if not (off <= _FARTHEST_MEAN and low >= 1 / _LARGEST_RATIO and high <= _LARGEST_RATIO):
        raise SFDError(
            f"{path} is not of these latents: normalised with it, means are up to {off:.2g} from 0 and standard "
            f"deviations {low:.2g} to {high:.2g} in place of 1; fetch the right file, or remove it to have the "
            "statistics computed"
        )


def write_published(latents: LatentSet, out: Path, shard_size: int = 10_000) -> None:
    """Write latents as published shards with their statistics, readable here and by the published code.

    Args:
        latents: of the streams texture and semantic only.
        out: a new folder.
        shard_size: images per shard.
    """
    for name in latents.manifest.streams:
        if name not in KEYS:
            raise SFDError(f"published latents hold the streams texture and semantic, but here is {name!r}")
    files.check_replaceable(out)
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
            shown.update(len(indices))
        for name, record in latents.manifest.streams.items():
            shape = (1, record.channels, 1, 1)
            statistics = {"mean": torch.tensor(record.mean).view(shape), "std": torch.tensor(record.std).view(shape)}
            torch.save(statistics, partial / f"{KEYS[name]}_stats.pt")
