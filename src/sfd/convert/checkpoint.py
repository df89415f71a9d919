"""Checkpoint files from elsewhere: safetensors, or what `torch.save` wrote. Nothing in them is ever run."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from sfd.utils import files
from sfd.utils.errors import SFDError, unknown

# Under which name training scripts keep a state dictionary; if there are several, the first is taken.
STATES = ("ema", "model", "model_state_dict", "state_dict")
# What wrappers put before every name: distributed training, and torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
_BUILTINS = {f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, int, float, str, bool, frozenset)}


class Checkpoint(NamedTuple):
    """One state dictionary out of a file."""

    tensors: dict[str, Tensor]
    state: str  # the name it was kept under; "" if the file holds nothing else
    others: dict[str, Any]  # what else the file holds
    foreign: tuple[str, ...] = ()  # names of other libraries' classes, whose objects became placeholders

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


class Placeholder:
    """Stands for an object of another library: it takes whatever the object was made from, and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"values": (state,)})


class DictPlaceholder(OrderedDict[Any, Any]):
    """Stands for an object of another library that is a dictionary."""

    def __new__(cls, *values: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        """Make a plain one, the only kind that the reader fills."""
        return OrderedDict()


def read_checkpoint(path: Path, state: str | None = None) -> Checkpoint:
    """Read a state dictionary, on the CPU and through a memory map where the format allows it.

    Args:
        path: a safetensors file, or one of `torch.save`.
        state: which of several state dictionaries ("ema", "model", …); None: the first of `STATES` that is there.
    """
    values, foreign = _read(path)
    if _is_state(values):
        if state is not None:
            raise SFDError(f"{path} is one state dictionary without a name, so there is no {state!r}; leave it out")
        return Checkpoint(_plain_names(values, path), "", {})
    states = {name: values[name] for name in STATES if _is_state(values.get(name))}
    if not states:
        found = ", ".join(map(str, list(values)[:6])) or "nothing"
        raise SFDError(f"{path} holds no state dictionary: it has {found}; expected one of {', '.join(STATES)}")
    name = next(iter(states)) if state is None else state
    if name not in states:
        raise unknown(f"state dictionary in {path.name}", name, states)
    others = {str(key): value for key, value in values.items() if key != name}
    return Checkpoint(_plain_names(states[name], path), name, others, foreign)


def plain(value: Any) -> Any:
    """Turn a placeholder of a configuration (OmegaConf's, argparse's) into plain dictionaries, lists and values."""
    if isinstance(value, Placeholder):
        held = vars(value)
        return plain(held["_content"] if "_content" in held else held.get("_val", held))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def _read(path: Path) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """Read what a file holds, and the names of foreign classes in it."""
    try:
        with path.open("rb") as handle:
            start = handle.read(512)
    except OSError as error:
        raise files.as_user_error(error, path) from None
    if reason := files.failed_download(start):
        raise SFDError(f"{path} is {reason}")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return dict(files.read_tensors(path)), ()
    if not start.startswith((b"PK", b"\x80")):
        raise SFDError(f"{path} is neither a safetensors file nor one of torch.save; give a checkpoint")
    try:
        names = get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # of the format before zip files, or damaged: the reader below says which
        names = []
    values, foreign = _read_pickled(path, names)
    if not isinstance(values, dict):
        raise SFDError(f"{path} holds a {type(values).__name__}, but a dictionary of tensors was expected")
    return values, foreign


def _read_pickled(path: Path, names: list[str]) -> tuple[Any, tuple[str, ...]]:
    """Read what `torch.save` wrote, with placeholders for these classes; functions are refused."""
    running = sorted(name for name in names if not _is_class(name))
    if running:
        raise SFDError(
            f"{path} would call {', '.join(running)} when it is loaded, so it is refused; nothing of it was run. If "
            "you trust who made it, save its state dictionary alone, best as safetensors"
        )
    foreign = tuple(sorted(name for name in names if name not in _BUILTINS and not name.startswith("collections.")))
    try:
        return _with_placeholders(path, names, Placeholder), foreign
    except SFDError:
        if not foreign:
            raise
        return _with_placeholders(path, names, DictPlaceholder), foreign


def _with_placeholders(path: Path, names: list[str], kind: type) -> Any:
    stand_ins: list[Any] = []
    for name in names:
        module, _, last = name.rpartition(".")
        base = DictPlaceholder if module == "collections" else kind
        body = {"__module__": module, "__qualname__": last}
        stand_ins.append(_BUILTINS.get(name) or type(last, (base,), body))
    with safe_globals(stand_ins):
        return files.read_pickled(path)


def _is_class(name: str) -> bool:
    """Tell classes from functions by their names."""
    package, last = name.partition(".")[0], name.rpartition(".")[2]
    return name in _BUILTINS or package in ("collections", "numpy", "datetime") or last.lstrip("_")[:1].isupper()


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(t, Tensor) for t in value.values())


def _plain_names(state: Mapping[Any, Tensor], path: Path) -> dict[str, Tensor]:
    """Take wrappers' prefixes off the names; refuse numbers that are not finite, or more than the file holds."""
    tensors = {str(name): tensor for name, tensor in state.items()}
    for name, tensor in tensors.items():
        stored = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0
        if stored < math.prod(tensor.shape) * tensor.element_size():
            shape = "×".join(map(str, tensor.shape))
            raise SFDError(f"{path}: tensor {name} says it is {shape}, but the file holds less; fetch it again")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SFDError(f"{path}: tensor {name} has numbers that are not finite; take a checkpoint from before that")
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
