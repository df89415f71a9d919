"""Checkpoint files from elsewhere: safetensors, or what `torch.save` wrote. Nothing in them is ever run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfd.utils import files
from sfd.utils.errors import SFDError, unknown

# Under which name training scripts keep a state dictionary; where there are several, the first is what is wanted.
STATES = ("ema", "model", "model_state_dict", "state_dict")
# What wrappers put before every name: distributed training, and torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


class Checkpoint(NamedTuple):
    """One state dictionary out of a file."""

    tensors: dict[str, Tensor]
    state: str
    """The name it was kept under; "" if the file holds nothing else."""
    others: dict[str, Any]
    """What the file holds beside it."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def read_checkpoint(path: Path, state: str | None = None) -> Checkpoint:
    """Read a state dictionary, on the CPU and through a memory map where the format allows it.

    Args:
        path: a safetensors file, or one of `torch.save`.
        state: which of several state dictionaries ("ema", "model", …); None: the first of `STATES` that is there.

    Raises:
        SFDError: the file is missing, damaged, carries code, holds no such state dictionary, or one that is not finite.
    """
    values = _read(path)
    states = {name: values[name] for name in STATES if _is_state(values.get(name))}
    if _is_state(values):
        if state is not None:
            raise SFDError(f"{path} is one state dictionary without a name, so there is no {state!r}; leave it away")
        return Checkpoint(_plain_names(values, path), "", {})
    if not states:
        found = ", ".join(map(str, list(values)[:6])) or "nothing"
        raise SFDError(f"{path} holds no state dictionary: it has {found}; expected one of {', '.join(STATES)}")
    name = next(iter(states)) if state is None else state
    if name not in states:
        raise unknown(f"state dictionary in {path.name}", name, states)
    others = {str(key): value for key, value in values.items() if key != name}
    return Checkpoint(_plain_names(states[name], path), name, others)


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: str) -> None:
    """Write a state dictionary, whole or not at all: safetensors, or `torch.save` of {state: …} for .pt, .pth, .ckpt.

    Raises:
        SFDError: the file's name ends otherwise.
    """
    if path.suffix == ".safetensors":
        files.write_tensors(path, tensors)
    elif path.suffix in (".pt", ".pth", ".ckpt"):
        with files.atomic_write(path) as partial:
            torch.save({state: {name: t.detach().contiguous().cpu() for name, t in tensors.items()}}, partial)
    else:
        raise SFDError(f"{path} should end in .safetensors, .pt, .pth or .ckpt, for a file in the published format")


def _read(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as handle:
            start = handle.read(9)
    except FileNotFoundError:
        raise SFDError(f"there is no file {path}") from None
    except OSError as error:
        raise files.as_user_error(error, path) from None
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return dict(files.read_tensors(path))
    if not start.startswith((b"PK", b"\x80")):
        raise SFDError(f"{path} is neither a safetensors file nor one of torch.save; give a checkpoint")
    values = files.read_pickled(path)
    if not isinstance(values, dict):
        raise SFDError(f"{path} holds a {type(values).__name__}, but a dictionary of tensors was expected")
    return values


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
