"""Components: networks saved as a folder of `config.json` and `model.safetensors`.

The `identity` stands for a component wherever it is recorded, as the tokenizer of latents for example. It is a hash of
kind, name, configuration and weights (at half precision, so that float16 and float32 copies of published weights
agree), computed when the weights are made. A saved component carries it along, whatever dtype it is saved in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from sfd.utils import files, registry
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError
from sfd.utils.hub import HubFolder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

CARD = """---
library_name: sfd
tags: [semantic-first-diffusion, "arxiv:2512.04926"]
---
# {0.kind} `{0.name}`

A component of semantic-first diffusion with the identity `{0.identity}`.
Load it with `{1.__module__}.{1.__name__}.from_pretrained`.
"""

Network = TypeVar("Network", bound=nn.Module)
Own = TypeVar("Own", bound="Component")


class Component(nn.Module, HubFolder):
    """A network that can be saved as a folder, also on the hub. Subclasses set `config` in their constructor."""

    kind: ClassVar[str]  # what it does: "texture encoder", "semantic encoder", "compressor"
    name: ClassVar[str]  # which one it is: the module that defines it
    config: Settings
    saved_identity = ""  # the identity, once the weights are final
    source = ""  # the published model that it was loaded from: a folder or a hub name

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits: of a loaded component what was saved with it, else computed."""
        return self.saved_identity or fingerprint([self.kind, self.name, self.config.model_dump(mode="json")], self)

    def finished(self: Own) -> Own:
        """Take the weights as final: in eval mode, without gradients, with an identity that stays."""
        self.eval().requires_grad_(False)
        self.saved_identity = self.identity
        return self

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the component to `folder`, weights as `dtype`; the configuration last: where it is, the rest is."""
        files.write_tensors(folder / WEIGHTS_FILE, {name: t.to(dtype) for name, t in self.state_dict().items()})
        about = {
            "kind": self.kind,
            "name": self.name,
            "identity": self.identity,
            "sha256": files.checksum(folder / WEIGHTS_FILE),
            "config": self.config.model_dump(mode="json"),
        }
        files.write_json(folder / CONFIG_FILE, about)

    @classmethod
    def from_folder(cls: type[Own], folder: Path) -> Own:
        """Load a component of this class; see `load`."""
        found = load(folder, (cls.kind,), cls.__module__.rpartition(".")[0])
        if found.name != cls.name:
            raise SFDError(f"{folder} holds the {cls.kind} {found.name!r}, not {cls.name!r}; load it by its own class")
        return cast(Own, found)

    def card(self) -> str:
        """Write the text of the model card."""
        return CARD.format(self, type(self))


def load(folder: Path, kinds: tuple[str, ...], package: str) -> Component:
    """Load a component, in eval mode, without gradients, on the CPU, as float32.

    Args:
        folder: holds `config.json` and `model.safetensors`.
        kinds: the kinds of component that are accepted.
        package: has a module of the component's name, with a `Config` and `build(config)`.
    """
    about, config, build = _described(folder, kinds, package, "sha256")
    tensors = read_weights(folder / WEIGHTS_FILE, about["sha256"])
    component: Component = assemble(lambda: build(config), tensors, str(folder))
    component.saved_identity = about["identity"]
    return component


def read_config(folder: Path, kinds: tuple[str, ...], package: str) -> Settings:
    """Read a component's configuration alone; see `load`."""
    return _described(folder, kinds, package)[1]


def _described(
    folder: Path, kinds: tuple[str, ...], package: str, *needed: str
) -> tuple[dict[str, Any], Settings, Callable[[Settings], Component]]:
    """Read `config.json`: all of it, the configuration in it, and what builds the component."""
    path, wanted = folder / CONFIG_FILE, " or ".join(kinds)
    about = files.read_json(path, wanted)
    missing = [key for key in ("kind", "name", "identity", "config", *needed) if key not in about]
    if missing:
        raise SFDError(f"{path} describes no {wanted}: it lacks {', '.join(missing)}; restore the file")
    if about["kind"] not in kinds:
        raise SFDError(f"{folder} holds a {about['kind']} ({about['name']}), but a {wanted} was expected")
    module = registry.find(package, about["name"], about["kind"])
    return about, parse(module.Config, about["config"], str(path)), module.build


def fingerprint(about: Any, network: nn.Module) -> str:
    """Hash plain values and a network's weights, rounded to half precision, into sixteen hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file whose SHA-256 is known."""
    tensors = files.read_tensors(path)
    if files.checksum(path) != sha256:
        raise SFDError(f"{path} is damaged or is not the file that was saved here: its SHA-256 differs; restore it")
    return tensors


def assemble(build: Callable[[], Network], tensors: Mapping[str, Tensor], where: str) -> Network:
    """Build a network around its weights, in eval mode, without gradients, as float32.

    Args:
        build: makes the network; called on the meta device, so that nothing is drawn that would be overwritten.
        tensors: all of its weights and persistent buffers.
        where: they come from; errors name it.
    """
    with torch.device("meta"):
        network = build()
    # Copied: a file's tensors share one mapped block of memory.
    own = {n: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True) for n, t in tensors.items()}
    fill(network, own, where)
    return network.eval().requires_grad_(False)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give a network all of its weights; `where` they come from is named in errors."""
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise SFDError(
            f"{where}: the weights do not fit the configuration ({reason}); use files of one model"
        ) from None
