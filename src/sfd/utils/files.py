"""Files that are either whole or not there: written beside, flushed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from sfd.utils.errors import SFDError

CHECKSUM = "checksum"

# The mask is asked for once: that takes setting it, which threads that make files would notice.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


@contextmanager
def written(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a name beside `path` to write to; rename it to `path` at the end, or remove it if the block fails.

    The block may write a file or make a folder. Only a folder replaces a folder that stands at `path`. Whatever wrote
    the files, they get the mode that the process's umask gives to new ones. What a killed process left half written at
    `path` is removed first, so no two processes may write to one path at a time (see `exclusive`), but for a `shared`
    one: there, the last to write wins.

    Raises:
        SFDError: the disk is full, the place cannot be written to, or a file would replace a folder.
    """
    if not path.name:
        raise SFDError(f"{path} is a folder, but a file is to be written; give a file's name")
    partial = partial_of(path, f".{secrets.token_hex(4)}" if shared else "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        _settle(partial)
        if path.is_dir():
            if not partial.is_dir():
                raise SFDError(f"{path} is a folder, but a file is to be written; give a file's name")
            shutil.rmtree(path)
        partial.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        _remove(partial)
        raise explained(error, path) from error
    except BaseException as error:
        _remove(partial)
        # The safetensors library wraps the operating system's errors in its own.
        if "No space left" in str(error):
            raise _disk_full(path) from error
        raise


def partial_of(path: Path, own: str = "") -> Path:
    """Give the name under which `written` lets a path be written."""
    return path.with_name(f".{path.name}{own}.partial")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that is this process's alone."""
    for partial in folder.glob(".*.partial"):
        _remove(partial)


def explained(error: OSError, path: Path) -> SFDError:
    """Say in a sentence why a path cannot be written or read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SFDError(f"{path} cannot be accessed ({error.strerror}); choose another or change its permissions")
    return SFDError(f"{path}: {error.strerror or error}")


def _disk_full(path: Path) -> SFDError:
    folder = next((parent for parent in path.parents if not parent.name.endswith(".partial")), path)
    return SFDError(f"no space left on the disk that holds {folder}; free some and run the same command again")


def _settle(path: Path) -> None:
    """Bring a file, or all in a folder, to the disk, readable by whom the umask says: some libraries write 0600."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        file.chmod(0o666 & ~_UMASK)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    for folder in [path, *path.rglob("*")] if path.is_dir() else []:
        if folder.is_dir():
            _flush_folder(folder)


def _flush_folder(path: Path) -> None:
    # The rename itself lasts through a power cut only once the folder is on disk; Windows cannot open folders.
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file, whole or not at all; `shared`: other processes may be at it too."""
    with written(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Write a JSON file, whole or not at all; an object that is `sealed` holds a checksum, which `read_json` checks."""
    if sealed:
        value = {**value, CHECKSUM: _checksum(value)}
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Write a value as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Turn a value into what JSON would give back: tuples become lists, keys text."""
    return json.loads(json.dumps(value))


def now() -> str:
    """Give the present time in UTC, to the microsecond, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat()


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        SFDError: it is a device or a pipe, which may never end, or never begin.
        OSError: it is missing or cannot be read.
        ValueError: it is no text.
    """
    check_regular(path)
    return path.read_text(encoding="utf-8")


def check_regular(path: Path) -> None:
    """Refuse devices, pipes and sockets; what is missing is for the reader to say."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise SFDError(f"{path} is no regular file, but a device or a pipe; give a file")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; the checksum of one that was sealed is taken off.

    Raises:
        SFDError: it is missing or damaged; `what` ("model directory", …) says what should have been there.
    """
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise SFDError(f"{path.parent} is no {what}: {path.name} is missing") from None
    except OSError as error:
        raise explained(error, path) from None
    except (ValueError, RecursionError) as error:
        raise SFDError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise SFDError(f"{path} is damaged: expected a JSON object, found {type(value).__name__}")
    found = value.pop(CHECKSUM, None)
    if found is not None and found != _checksum(value):
        raise SFDError(
            f"{path} is damaged or was changed: it does not match the checksum in it; restore it, or take its "
            f"{CHECKSUM!r} out if the change is yours"
        )
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with written(path) as partial:
        plain = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
        save_file(plain, str(partial), dict(metadata) if metadata else None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        SFDError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise SFDError(f"{path} is missing; expected a safetensors file there") from None
    except OSError as error:
        raise explained(error, path) from None
    except SafetensorError as error:
        raise SFDError(f"{path} is no intact safetensors file ({error}); make or fetch it again") from None


def read_pickled(path: Path) -> Any:
    """Load what `torch.save` wrote, if it is tensors and plain values alone.

    Raises:
        SFDError: it is missing or damaged, or it would run code.
    """
    import torch

    try:
        with path.open("rb") as handle:
            zipped = handle.read(2) == b"PK"  # the older format cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise explained(error, path) from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL [\w.]+|Unsupported operand \d+", str(error))
        reason = named[0] if named else "unreadable"
        raise SFDError(
            f"{path} cannot be read as tensors alone ({reason}): it is damaged, or loading it could run code; nothing "
            "of it was run. If you trust who made it, save its state dictionary alone, best as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle can end in any of them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SFDError(f"{path} cannot be read ({reason[:120]}); make or fetch it again") from None


def checksum(path: Path) -> str:
    """Compute the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def exclusive(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process alone.

    Args:
        folder: made if it is not there.
        wait: seconds to wait for another process to leave it.

    Raises:
        SFDError: another process holds it, or it cannot be made.
    """
    message = f"{folder} is in use by another run; wait for it to end or choose another folder"
    with locked(folder / ".lock", message, wait=wait):
        yield


@contextmanager
def locked(path: Path, message: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file for this process alone, also against other machines that share the disk.

    Args:
        path: the lock file; it and its folder are made if they are not there.
        message: said where another process holds it.
        wait: seconds to wait for that process first.

    Raises:
        SFDError: another process holds it, or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        lock.acquire(timeout=wait)
    except filelock.Timeout:
        raise SFDError(message) from None
    except OSError as error:
        raise explained(error, path.parent) from None
    try:
        yield
    finally:
        lock.release()


def check_space(folder: Path, needed: int, otherwise: str) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        folder: where it goes; it need not be there yet.
        needed: bytes.
        otherwise: what to do in place of freeing some.

    Raises:
        SFDError: there is less space.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise SFDError(
            f"{folder} needs {needed / 2**30:.3g} GiB more, but its disk has {free / 2**30:.3g} GiB free; free some, "
            f"choose another --out, or {otherwise}"
        )
