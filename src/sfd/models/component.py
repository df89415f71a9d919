"""Trained parts as folders: `config.json` says what it is, `model.safetensors` holds its weights.

A part's identity is a hash of its name, its configuration and its weights at half precision. Latents remember the
identity of what made them; rounding to half precision before hashing lets a part be shipped in float16 and stay itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sfd.utils import files
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class Component(nn.Module):
    """A network that can be saved as a folder. Subclasses say what they are and set `config` when constructed."""

    kind: ClassVar[str]  # what it does: "texture encoder", "semantic encoder", "compressor"
    name: ClassVar[str]  # which one it is: the module that defines it
    config: Settings

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits that stand for this configuration with these weights."""
        digest = hashlib.sha256(json.dumps([self.kind, self.name, self.config.model_dump(mode="json")]).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write this part to `folder`, weights as `dtype`. The configuration goes last: where it is, the rest is."""
        files.write_tensors(folder / WEIGHTS_FILE, {name: t.to(dtype) for name, t in self.state_dict().items()})
        about = {
            "kind": self.kind,
            "name": self.name,
            "identity": self.identity,
            "sha256": files.checksum(folder / WEIGHTS_FILE),
            "config": self.config.model_dump(mode="json"),
        }
        files.write_json(folder / CONFIG_FILE, about, sealed=True)

    def fill(self, saved: Saved) -> None:
        """Take the weights of a saved part, as float32.

        Raises:
            SFDError: tensors are missing, left over or misshapen, or the weights are not those that were saved.
        """
        load_tensors(self, saved.tensors, str(saved.folder))
        if self.identity != saved.identity:
            raise SFDError(
                f"{saved.folder}: {CONFIG_FILE} was saved with weights of identity {saved.identity}, but "
                f"{WEIGHTS_FILE} beside it has {self.identity}; restore both files from one source"
            )
        check_sum(saved.folder / WEIGHTS_FILE, saved.sha256)


class Saved(NamedTuple):
    """What a part's folder holds."""

    folder: Path
    kind: str
    name: str
    identity: str
    sha256: str | None
    """Of the file of weights; None of folders from before it was kept."""
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read(folder: Path, kinds: tuple[str, ...]) -> Saved:
    """Read a part's folder; nothing is unpickled.

    Args:
        folder: holds `config.json` and `model.safetensors`.
        kinds: the kinds of part that are welcome.

    Raises:
        SFDError: a file is missing or unreadable, or the part is of another kind.
    """
    wanted = " or ".join(kinds)
    about = _read_config(folder / CONFIG_FILE, wanted)
    if about["kind"] not in kinds:
        raise SFDError(f"{folder} holds a {about['kind']} ({about['name']}), but a {wanted} was expected")
    tensors = files.read_tensors(folder / WEIGHTS_FILE)
    return Saved(folder, about["kind"], about["name"], about["identity"], about.get("sha256"), about["config"], tensors)


def check_sum(path: Path, expected: str | None) -> None:
    """Notice bits of a file of weights that its identity, at half precision, passes over.

    Raises:
        SFDError: the file has another SHA-256 than `expected`, if that is known.
    """
    if expected is not None and files.checksum(path) != expected:
        raise SFDError(f"{path} is damaged or was changed: it has not the checksum that was kept; restore it")


def _read_config(path: Path, wanted: str) -> dict[str, Any]:
    about = files.read_json(path, wanted)
    missing = [key for key in ("kind", "name", "identity", "config") if key not in about]
    if missing:
        raise SFDError(f"{path} does not describe a {wanted}: it lacks {', '.join(missing)}; restore the file")
    return about


def check_fit(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that a network does not fit, before it is built: a configuration can ask for any memory.

    Args:
        build: makes the network; called on the meta device, which allocates nothing.
        tensors: its weights.
        where: they come from.

    Raises:
        SFDError: they do not fit, or there is no such network.
    """
    try:
        with torch.device("meta"):
            expected = shapes(build())
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise SFDError(f"{where}: the configuration describes no network ({reason}); use the model's own") from None
    _check(tensors, expected, where)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill all of a module's weights and buffers by name, converted to their own types.

    Raises:
        SFDError: some tensors are missing, left over, or of another shape; they are named.
    """
    _check(tensors, shapes(module), where)
    module.load_state_dict(dict(tensors))


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    problems = misfit(tensors, expected)
    if problems:
        raise SFDError(f"{where}: the weights do not fit the configuration ({problems}); use the files of one model")


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a module's state."""
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def differences(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """List the tensors that are "missing", "left over" and "misshapen", by comparing names and shapes."""
    return {
        "missing": sorted(expected.keys() - given.keys()),
        "left over": sorted(given.keys() - expected.keys()),
        "misshapen": [
            f"{name} {given[name]} for {shape}"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ],
    }


def misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Name the tensors that are missing, left over or misshapen; nothing ("") where all fit.

    Args:
        tensors: what is given.
        expected: the shape of everything that should be, by name.
    """
    problems = differences({name: tuple(t.shape) for name, t in tensors.items()}, expected)
    return "; ".join(f"{label}: {some(names)}" for label, names in problems.items() if names)


def fitting(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse tensors that are not those expected.

    Raises:
        SFDError: some are missing, left over or misshapen; they are named, and so is `what` they should make up.
    """
    problems = misfit(tensors, expected)
    if problems:
        raise SFDError(f"{what}: the tensors do not fit its configuration ({problems})")


def some(names: list[str], limit: int = 4) -> str:
    """List names, the first few of many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
