"""Checkpoints: one safetensors file per step, written in the background and renamed; the newest intact one counts.

A checkpoint holds tensors by name, which fill the live ones when a run resumes, and a JSON record in the file's
metadata with everything else. A SHA-256 over record and tensors shows damage. Only rank 0 writes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd.training.config import TrainSettings
from sfd.utils import distributed, files
from sfd.utils.errors import SFDError
from sfd.utils.progress import say

ENTRY = "checkpoint"  # the one entry of the metadata: safetensors writes several in any order, and bytes should repeat
PATTERN = f"step-{9 * '[0-9]'}.safetensors"  # copies under other names are left alone


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint in memory; `record` is all but the tensors."""

    path: Path
    record: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def step(self) -> int:
        """Number of steps that had been taken."""
        return int(self.record["step"])

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy what was saved into live tensors of the same names."""
        saved, live = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (self.tensors, state))
        if saved != live:
            name = next(name for name in (*saved, *live) if saved.get(name) != live.get(name))
            raise SFDError(
                f"the checkpoint {self.path} is of another network ({name} has shape {saved.get(name, 'none')}, "
                f"expected {live.get(name, 'none')}); use another folder, or the recipe that the run was started with"
            )
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(self.tensors[name])


def newest(folder: Path) -> Checkpoint | None:
    """Find the newest intact checkpoint, the same on all ranks; damaged ones are named and passed over."""
    path = distributed.decide(lambda: _newest_intact(folder))
    return None if path is None else _read(path)


def at_step(folder: Path, step: int) -> Checkpoint:
    """Read the checkpoint of one step; a damaged one is refused."""
    path = folder / f"step-{step:09d}.safetensors"
    if not path.exists():
        kept = ", ".join(str(int(each.stem.split("-")[1])) for each in sorted(folder.glob(PATTERN)))
        raise SFDError(
            f"{folder} has no checkpoint of step {step}; it has those of {kept or 'no step'} (train.keep_every)"
        )
    if not _intact(path):
        raise SFDError(f"{path} does not match its checksum; take the checkpoint of another step")
    return _read(path)


def weights_at(folder: Path, step: int) -> dict[str, Tensor]:
    """The model's weights in the checkpoint of one step; averaged ones (EMA) where it has them."""
    saved = at_step(folder, step).tensors
    prefix = "ema." if any(name.startswith("ema.") for name in saved) else "model."
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}


def newest_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of the newest checkpoint that has one, without reading or verifying its tensors."""
    for path in _paths(folder):
        with suppress(SFDError):
            return dict(json.loads(_metadata(path)["record"]))
    return None


def _newest_intact(folder: Path) -> Path | None:
    paths = _paths(folder)
    for path in paths:
        try:
            if _intact(path):
                return path
            say(f"checkpoint passed over: {path} does not match its checksum")
        except SFDError as error:
            say(f"checkpoint passed over: {error}")
    if paths:
        raise SFDError(f"no intact checkpoint in {folder} (all {len(paths)} are damaged); remove it to start anew")
    return None


def _intact(path: Path) -> bool:
    metadata = _metadata(path)
    return metadata["sha256"] == _digest(metadata["record"], files.read_tensors(path))


def _read(path: Path) -> Checkpoint:
    return Checkpoint(path, json.loads(_metadata(path)["record"]), files.read_tensors(path))


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as handle:
            return dict(json.loads((handle.metadata() or {})[ENTRY]))
    except (SafetensorError, OSError, KeyError) as error:
        raise SFDError(f"{path} is no intact checkpoint ({error})") from None


def _digest(record: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _paths(folder: Path) -> list[Path]:
    """List the checkpoints, newest first."""
    return sorted(folder.glob(PATTERN), reverse=True)


class CheckpointWriter:
    """Writes checkpoints in a thread: training waits until the state is copied, not until it is on the disk."""

    def __init__(self, folder: Path, settings: TrainSettings) -> None:
        self.folder, self.settings = folder, settings
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._host: dict[str, Tensor] = {}  # memory of the copy, used again for the next checkpoint

    def check_space(self, state: Mapping[str, Tensor]) -> None:
        """Refuse to start on a disk that cannot hold the checkpoints."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        # The oldest is removed once the newest is written.
        count = max(1, self.settings.keep_checkpoints + 1 - len(_paths(self.folder)))
        files.check_space(self.folder, count * size, "keep fewer checkpoints (train.keep_checkpoints)")

    def save(self, step: int, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> float:
        """Copy the state and begin to write it; give the seconds that training had to wait."""
        start = time.monotonic()
        self.wait()
        copied = self._copy(state)
        self._writing = self._pool.submit(self._write, step, copied, {**record, "step": step})
        return time.monotonic() - start

    def check(self) -> None:
        """Raise what went wrong in writing, if that is known by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Let the last checkpoint be written, successfully or not."""
        self._pool.shutdown(wait=True)

    def _copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in state.items():
            pinned = tensor.device.type == "cuda"
            if name not in self._host:
                self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
            self._host[name].copy_(tensor.detach(), non_blocking=pinned)
        for device in {tensor.device for tensor in state.values() if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return self._host

    def _write(self, step: int, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        text = json.dumps(record)
        entry = json.dumps({"record": text, "sha256": _digest(text, state)})
        files.write_tensors(self.folder / f"step-{step:09d}.safetensors", state, {ENTRY: entry})
        saved = {int(path.stem.removeprefix("step-")): path for path in _paths(self.folder)}
        # Newer ones are damaged, or of a run that was resumed from before them.
        newest = [other for other in saved if other <= step][: self.settings.keep_checkpoints]
        every = self.settings.keep_every
        for other, path in saved.items():
            if other > step or not (other in newest or (every and other % every == 0)):
                path.unlink()
