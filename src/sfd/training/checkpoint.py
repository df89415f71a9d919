"""Checkpoints: a folder a step, written beside and renamed, with checksums; the newest intact one counts.

A checkpoint holds tensors by dotted name, which fill the live ones when a run resumes. One process writes them as one
safetensors file; where they are shared out (FSDP), each process writes its shares (through
`torch.distributed.checkpoint`, in safetensors files too). Either can be read back by any number of processes.
"""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd.models.component import misfit
from sfd.training.config import TrainSettings
from sfd.training.parallel import local
from sfd.utils import distributed, files
from sfd.utils.errors import SFDError
from sfd.utils.progress import console

STATE, RECORD = "state.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found; `record` is all but the tensors (step, configuration, counters)."""

    path: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.record["step"])

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy what was saved into live tensors of the same names, whole or shared out.

        Raises:
            SFDError: other names or shapes were saved.
        """
        expected = {name: tuple(t.shape) for name, t in state.items()}
        if (self.path / STATE).exists() and not _shared(state):
            tensors = files.read_tensors(self.path / STATE)
            self._check(tensors, expected)
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(tensors[name])
            return
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        reader = HuggingFaceStorageReader(str(self.path))
        saved = reader.read_metadata().state_dict_metadata
        sizes = {name: m.size for name, m in saved.items() if isinstance(m, TensorStorageMetadata)}
        self._check({name: torch.empty(size, device="meta") for name, size in sizes.items()}, expected)
        with warnings.catch_warnings(), _explained(self.path):
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({name: t.detach() for name, t in state.items()}, storage_reader=reader)

    def _check(self, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
        differences = misfit(tensors, expected)
        if differences:
            raise SFDError(
                f"the checkpoint {self.path} is of another configuration ({differences}); use another folder, or the "
                "recipe that the run was started with"
            )


def newest(folder: Path, *, good: bool = False) -> Checkpoint | None:
    """Find the newest intact checkpoint; damaged ones are named and passed over.

    Args:
        folder: where they lie.
        good: only ones that training may go back to when it fails.

    Returns None when there is none at all.

    Raises:
        SFDError: there are checkpoints, but not one is intact.
    """
    # One process reads and verifies, so that all go on from the same one.
    step = distributed.broadcast(_newest_step(folder, good) if distributed.is_main_process() else None)
    if step is None:
        return None
    path = _path(folder, step)
    return Checkpoint(path, files.read_json(path / RECORD, "checkpoint"))


def newest_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of the newest checkpoint whose record can be read; nothing else of it is verified."""
    for path in _folders(folder):
        with suppress(SFDError):
            return files.read_json(path / RECORD, "checkpoint")
    return None


def _newest_step(folder: Path, good: bool) -> int | None:
    damaged = []
    for path in _folders(folder):
        try:
            record = _verified(path)
        except SFDError as error:
            damaged.append(path.name)
            console.print(f"checkpoint passed over: {error}", style="yellow", markup=False, soft_wrap=True)
        else:
            if record["good"] or not good:
                return int(record["step"])
    if damaged and not good:
        raise SFDError(f"no intact checkpoint in {folder} ({', '.join(damaged)} damaged); remove it to start anew")
    return None


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in _folders(folder):
        if path.name > _path(folder, step).name:
            shutil.rmtree(path)


class Writer:
    """Writes checkpoints while training goes on: copying the state stops it, bringing it to the disk does not."""

    def __init__(self, folder: Path, settings: TrainSettings, *, sharded: bool) -> None:
        self.folder, self.settings, self.sharded = folder, settings, sharded
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._hosted: dict[str, Tensor] = {}
        # The thread's talk must not get between the training step's.
        self._group = torch.distributed.new_group(backend="gloo") if sharded else None
        self._stager: Any = None

    def save(self, step: int, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> float:
        """Copy the state and begin to write it; give the seconds that training had to wait.

        Where tensors are shared out all processes must call this, else the leading one is enough.

        Raises:
            SFDError: the checkpoint before this one could not be written.
        """
        start = time.monotonic()
        self.wait()
        copied = self._copy(state)
        pause = time.monotonic() - start
        content = {**record, "step": step}
        self._thread = threading.Thread(target=self._write, args=(copied, content), name="checkpoint", daemon=True)
        self._thread.start()
        return pause

    def check(self) -> None:
        """Raise what went wrong in writing, if that is known yet."""
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            SFDError: the disk is full, or cannot be written to.
        """
        self.settle()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Wait until nothing is being written, successfully or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.sharded:
            from torch.distributed.checkpoint.staging import StateDictStager

            self._stager = self._stager or StateDictStager()
            return dict(self._stager.stage({name: t.detach() for name, t in state.items()}))
        pinned = False
        for name, tensor in state.items():
            pinned = tensor.device.type == "cuda"
            if name not in self._hosted:
                self._hosted[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
            self._hosted[name].copy_(tensor.detach(), non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()
        return self._hosted

    def _write(self, state: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        path = _path(self.folder, record["step"])
        try:
            record["good"] = self._finite(state) and record["good"]
            if distributed.is_main_process():
                with files.atomic_write(path) as partial:
                    partial.mkdir()
                    self._write_state(partial, state)
                    _seal(partial, record)
                _thin(path, self.settings)
            else:
                self._write_state(files.partial_of(path), state)
        except BaseException as error:
            self._error = error

    def _finite(self, state: Mapping[str, Tensor]) -> bool:
        """Whether training can go on from a state: a number too large for its type would stay in it for good."""
        finite = all(bool(torch.isfinite(t).all()) for t in local(state.values()) if t.is_floating_point())
        if self.sharded:
            shared = torch.tensor(int(finite))
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN, group=self._group)
            finite = bool(shared)
        return finite

    def _write_state(self, partial: Path, state: Mapping[str, Tensor]) -> None:
        if not self.sharded:
            files.write_tensors(partial / STATE, state)
            return
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        torch.distributed.barrier(self._group)  # the folder is there
        storage = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with _explained(partial):
            dcp.save(dict(state), storage_writer=storage, process_group=self._group)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Give all processes the error that one of them met; as PyTorch tells of it, nobody would take it for one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # no `Exception`
        met = next(iter(error.failures.values()))[0]
        raise (files.as_user_error(met, path) if isinstance(met, OSError) else met) from error


def _seal(partial: Path, record: Mapping[str, Any]) -> None:
    sums = {path.name: files.checksum(path) for path in sorted(partial.glob("*.safetensors"))}
    files.write_json(partial / RECORD, {**record, "sha256": sums})


def _thin(newest: Path, settings: TrainSettings) -> None:
    """Keep the newest, the newest `keep_checkpoints` good ones, and all at multiples of `keep_every`.

    What lies beyond the newest was found damaged and takes no other's place; training will write it again.
    """
    paths = [path for path in _folders(newest.parent) if path.name <= newest.name]
    good = [path for path in paths if _is_good(path)]
    every = settings.keep_every
    lasting = [path for path in paths if every and _step(path) and _step(path) % every == 0]
    for old in set(paths[1:]) - set(good[: settings.keep_checkpoints]) - set(lasting):
        shutil.rmtree(old)


def _is_good(path: Path) -> bool:
    """Whether training may go back to a checkpoint; of a damaged one, no."""
    try:
        return bool(files.read_json(path / RECORD, "checkpoint")["good"])
    except (SFDError, KeyError):
        return False


def _shared(state: Mapping[str, Tensor]) -> bool:
    return any(hasattr(tensor, "to_local") for tensor in state.values())


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _folders(folder: Path) -> list[Path]:
    """List checkpoint folders, newest first; not copies that somebody gave names of their own."""
    return sorted((p for p in folder.glob(f"step-{9 * '[0-9]'}") if p.is_dir()), reverse=True)


def _verified(path: Path) -> dict[str, Any]:
    record = files.read_json(path / RECORD, "checkpoint")
    if "sha256" not in record or "good" not in record:
        raise SFDError(f"{path / RECORD} is damaged or of another version")
    for name, checksum in record["sha256"].items():
        if not (path / name).is_file():
            raise SFDError(f"{path / name} is missing")
        if files.checksum(path / name) != checksum:
            raise SFDError(f"{path / name} does not match its checksum")
    return record
