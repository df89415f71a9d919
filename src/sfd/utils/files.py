"""Files and folders that are written whole or not at all, and read with errors that say what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from sfd.utils.errors import SFDError

PARTIAL = ".partial"


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write a file or a folder to; rename it to `path` at the end.

    If the block fails, `path` stays as it was. A folder replaces a folder: the old one is renamed aside first and
    removed last, so that one of the two is whole at any time. Files get the permissions of the process's umask.

    Args:
        path: what to write.
        shared: several processes may write to it at the same time; the last one wins.
    """
    if not path.name:
        raise SFDError(f"{path} is a folder, but a file is to be written; give a file's name")
    partial = partial_of(path, f".{secrets.token_hex(4)}" if shared else "")
    old = path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        if old.exists() and not path.exists():
            old.rename(path)  # a process was killed between the two renames below
        yield partial
        # Inside of a folder that is itself written by this function, the outer call does the rest once.
        if not any(parent.name.endswith(PARTIAL) for parent in path.parents):
            _fsync_tree(partial)
        if path.is_dir():
            if not partial.is_dir():
                raise SFDError(f"{path} is a folder, but a file is to be written; give a file's name")
            _remove(old)
            path.rename(old)
        partial.replace(path)
        _fsync(path.parent)
        _remove(old)
    except OSError as error:
        _remove(partial)
        raise as_user_error(error, path) from error
    except BaseException as error:
        _remove(partial)
        # The safetensors library wraps the operating system's errors in its own.
        if "No space left" in str(error):
            raise _disk_full(path) from error
        raise


def partial_of(path: Path, suffix: str = "") -> Path:
    """Name the temporary path that `atomic_write` uses for a path."""
    return path.with_name(f".{path.name}{suffix}{PARTIAL}")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder that no other process writes to."""
    for pattern in (f".*{PARTIAL}", ".tmp*"):  # the second is safetensors' own, while it writes
        for partial in folder.glob(pattern):
            _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync_tree(path: Path) -> None:
    """Flush a file, or a folder and all in it, to the disk, with the permissions of newly created files."""
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for item in [path, *path.rglob("*")]:
        if not item.is_dir():
            item.chmod(mode)
        _fsync(item)


def _fsync(path: Path) -> None:
    # A rename survives a power cut only once the folder is on disk; Windows cannot open folders.
    if os.name == "posix" or not path.is_dir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def as_user_error(error: OSError, path: Path) -> SFDError:
    """Say in a sentence why a path cannot be written or read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SFDError(f"{path} cannot be accessed ({error.strerror}); choose another or change its permissions")
    if error.errno == errno.ENOENT:
        return SFDError(f"there is no file or folder {path}; give another")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return SFDError(f"{path}: a file is in the place of a folder; give another path")
    return SFDError(f"{path}: {error.strerror or error}")


def _disk_full(path: Path) -> SFDError:
    folder = next((parent for parent in path.parents if not parent.name.endswith(PARTIAL)), path)
    return SFDError(f"no space left on the disk that holds {folder}; free some and run the same command again")


def check_replaceable(path: Path, own: Callable[[Path], bool] | None = None, what: str = "") -> None:
    """Refuse to overwrite what the user did not get from the same command. An empty folder may be replaced.

    Args:
        path: what would be written.
        own: tells whether an existing file is earlier output of the same command; None: nothing is replaced.
        what: names that output ("a trajectory").
    """
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        replaceable = own is not None and own(path)
    except (SFDError, OSError, ValueError):
        replaceable = False
    if not replaceable:
        why = f", and it is not {what} from this command" if own is not None else ""
        raise SFDError(f"{path} exists{why}, so it is not overwritten; choose another name, or remove it first")


def check_space(folder: Path, needed: int, otherwise: str) -> None:
    """Refuse to write `needed` bytes into a folder, which need not exist yet, if its disk has less space."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SFDError(
            f"{folder} needs {needed / 2**30:.3g} GiB more, but its disk has {free / 2**30:.3g} GiB free; free some, "
            f"choose another --out, or {otherwise}"
        )


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file atomically; see `atomic_write` for `shared`."""
    with atomic_write(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """Write a JSON file atomically; see `atomic_write` for `shared`."""
    write_text(path, to_json(value), shared=shared)


def to_json(value: Any) -> str:
    """Format a value as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def jsonable(value: Any) -> Any:
    """Turn a value into what JSON would give back: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` ("model directory", …) names in errors what its folder should have been."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not path.parent.exists():
            raise SFDError(f"there is no folder {path.parent}; a {what} was expected there") from None
        raise SFDError(f"{path.parent} is no {what} ({path.name} is missing); give one") from None
    except OSError as error:
        raise as_user_error(error, path) from None
    except (ValueError, RecursionError) as error:
        raise SFDError(f"{path} is {failed_download(path) or f'damaged: {error}'}") from None
    if not isinstance(value, dict):
        raise SFDError(f"{path} is damaged: expected a JSON object, found {type(value).__name__}")
    value.pop("checksum", None)  # version 0.1.0 wrote one
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    with atomic_write(path) as partial:
        contiguous = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
        save_file(contiguous, str(partial), dict(metadata) if metadata else None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file through a memory map: what is not used of the tensors is not read from the disk."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise SFDError(f"{path} is missing; expected a safetensors file there") from None
    except OSError as error:
        raise as_user_error(error, path) from None
    except SafetensorError as error:
        reason = failed_download(path) or f"no intact safetensors file ({error}); make or fetch it again"
        raise SFDError(f"{path} is {reason}") from None


def failed_download(file: Path | bytes) -> str | None:
    """Say what a failed download left in place of a file, given its path or its first bytes; None: nothing known."""
    if isinstance(file, Path):
        with file.open("rb") as handle:
            file = handle.read(512)
    start = file[:512].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run `git lfs pull` in its repository, or download the file"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file itself; download it again, logged in where that is needed"
    return None


def read_pickled(path: Path) -> Any:
    """Load what `torch.save` wrote if it holds tensors and plain values only; nothing in the file is executed."""
    import torch

    try:
        with path.open("rb") as handle:
            zipped = handle.read(2) == b"PK"  # the older format cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise as_user_error(error, path) from None
    except Exception as error:  # a damaged pickle can end in any of them
        download = failed_download(path)
        if download is not None:
            raise SFDError(f"{path} is {download}") from None
        named = re.search(r"GLOBAL [\w.]+|Unsupported operand \d+", str(error))
        reason = named[0] if named else type(error).__name__
        raise SFDError(
            f"{path} cannot be read as tensors alone ({reason}): it is damaged, or loading it could run code; nothing "
            "of it was run. If you trust who made it, save its state dictionary alone, best as safetensors"
        ) from None


def checksum(path: Path) -> str:
    """Compute the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; it is made if it does not exist, and removed again if it stays empty."""
    lock, made = folder / ".lock", [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with file_lock(lock, f"{folder} is in use by another run; wait for it to end or choose another folder"):
            yield
    finally:
        with suppress(OSError):
            if made and list(folder.iterdir()) == [lock]:
                lock.unlink()
                for path in made:
                    path.rmdir()


@contextmanager
def file_lock(path: Path, message: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file for this process alone, also against other machines that share the disk.

    Where another process holds it, wait for `wait` seconds (-1: as long as it takes), then raise `message`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        lock.acquire(timeout=wait)
    except filelock.Timeout:
        raise SFDError(message) from None
    except OSError as error:
        raise as_user_error(error, path.parent) from None
    try:
        yield
    finally:
        lock.release()
