"""What every encoder is, and how one is found and loaded. Texture encoders also decode; semantic ones give features.

An encoder `NAME` is the module `sfd/encoders/NAME.py`. It has a `Config` and a function `build(config)` that gives a
`Component` with fresh weights; if published weights can be used, also `planned(source, given)`, which reads their
`Config` alone, and `pretrained(source, given)`. See docs/extending-encoders.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from sfd.models import component
from sfd.models.component import Component
from sfd.models.compressor import Compressor
from sfd.models.convnet import check_divisible as check_divisible
from sfd.utils import files, registry
from sfd.utils.config import parse
from sfd.utils.errors import SFDError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TEXTURE, SEMANTIC = "texture encoder", "semantic encoder"
NAMED = "pretrained"  # the field of a `config.json` that names a published model in place of weights
LARGE = 16 * 2**20  # parameters; larger published semantic encoders are saved by name


class EncoderConfig(Protocol):
    """What planning needs to know of an encoder, without building it.

    Image sides must be a multiple of `downsample`, or of the field `tile` where there is one.
    """

    kind: ClassVar[str]  # TEXTURE or SEMANTIC

    @property
    def channels(self) -> int:
        """C of what it gives."""

    @property
    def downsample(self) -> int:
        """f: image pixels on a side of one position of the grid."""


class SemanticEncoder(Protocol):
    """Encodes what is where in an image. Encoding is deterministic and keeps no gradient."""

    channels: int  # C
    downsample: int  # f: image pixels on a side of one position of the grid

    @property
    def identity(self) -> str:
        """A short hash of configuration and weights."""

    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to features (B, C, H / f, W / f)."""

    def to(self, device: Any) -> Any:
        """Move to a device."""


class TextureEncoder(SemanticEncoder, Protocol):
    """Encodes images so that they can be decoded; `encode` gives latents (B, C, H / f, W / f)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents (B, C, h, w) back to images (B, 3, h·f, w·f), about [-1, 1]; clamping is left to the caller."""


def semantic_identity(encoder: SemanticEncoder, compressor: Compressor) -> str:
    """Identity of the semantic stream's tokenizer, which is both together."""
    return f"{encoder.identity}+{compressor.identity}"


def encoder_module(name: str) -> ModuleType:
    """Import the module that defines an encoder."""
    return registry.find("sfd.encoders", name, "encoder")


def load_encoder(folder: Path, *kinds: str) -> Component:
    """Load the component in `folder`, in eval mode, without gradients, on the CPU; `kinds`: both, unless given."""
    return component.load(folder, kinds or (TEXTURE, SEMANTIC), "sfd.encoders")


def open_texture(source: str | Path) -> TextureEncoder:
    """Open a texture encoder, in eval mode, without gradients, on the CPU.

    Args:
        source: the folder of a component, a folder in diffusers' format, or a hub name (see `sfd.encoders.kl`).
    """
    return cast(TextureEncoder, _open(str(source), TEXTURE, "kl"))


def open_semantic(source: str | Path) -> SemanticEncoder:
    """Open a semantic encoder, in eval mode, without gradients, on the CPU.

    Args:
        source: the folder of a component, a folder in transformers' format, or a hub name (see `sfd.encoders.vit`).
    """
    return cast(SemanticEncoder, _open(str(source), SEMANTIC, "vit"))


def _open(source: str, kind: str, published: str) -> Component | NamedEncoder:
    config = Path(source) / component.CONFIG_FILE
    about = files.read_json(config, kind) if config.is_file() else {}
    if NAMED in about:
        return NamedEncoder(Path(source), about)
    return load_encoder(Path(source), kind) if "kind" in about else load_published(published, source, {})


class NamedEncoder:
    """A large published semantic encoder that was saved by its name and identity, loaded by its first `encode` or `to`.

    Its `config.json` holds the published model's name, the configuration and the identity, which is checked.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about, self.identity = folder, about, str(about["identity"])
        config = planned_encoder(about["name"], None, str(folder), {})
        self.channels, self.downsample = config.channels, config.downsample
        self._loaded: Component | None = None

    def encode(self, images: Tensor) -> Tensor:
        """Load the encoder and encode; see `SemanticEncoder`."""
        return cast(Tensor, self.to(images.device).encode(images))

    def to(self, device: Any) -> Any:
        """Give the encoder itself, on a device."""
        if self._loaded is None:
            about = self.about
            self._loaded = load_published(about["name"], about[NAMED], about["config"])
            if self._loaded.identity != self.identity:
                raise SFDError(
                    f"{self.folder} needs {about[NAMED]} of identity {self.identity}, but the one here has "
                    f"{self._loaded.identity}; put back the version that was used in training"
                )
        return self._loaded.to(device)


def save_semantic(encoder: SemanticEncoder, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save an encoder to `folder`, weights as `dtype`; a large published one by its name and identity."""
    if isinstance(encoder, NamedEncoder):
        files.write_json(folder / component.CONFIG_FILE, encoder.about)
        return
    part = cast(Component, encoder)
    if part.source and sum(tensor.numel() for tensor in part.state_dict().values()) > LARGE:
        about = {"kind": SEMANTIC, "name": part.name, "identity": part.identity, NAMED: part.source}
        files.write_json(folder / component.CONFIG_FILE, about | {"config": part.config.model_dump(mode="json")})
    else:
        part.save(folder, dtype)


def load_published(name: str, source: str, given: Mapping[str, Any]) -> Component:
    """Load a published encoder, in eval mode, without gradients, on the CPU.

    Args:
        name: the encoder's module.
        source: a folder in the hub's format, or a hub name.
        given: fields of its `Config` that are chosen, or that it is expected to have.
    """
    encoder: Component = encoder_module(name).pretrained(source, given)
    encoder.source = source
    return encoder


def planned_encoder(name: str, source: str | None, folder: str | None, given: dict[str, Any]) -> EncoderConfig:
    """Learn an encoder's configuration without its weights; nothing is downloaded.

    Args:
        name: the encoder's module.
        source: a published model (folder or hub name); None: it is not published.
        folder: that of a trained component; None: it is trained in the run.
        given: fields of its `Config`.
    """
    if folder is not None:
        return cast(EncoderConfig, component.read_config(Path(folder), (TEXTURE, SEMANTIC), "sfd.encoders"))
    module = encoder_module(name)
    return cast(EncoderConfig, module.planned(source, given) if source else parse(module.Config, given))


def autoencoder_class() -> type[AutoencoderKL]:
    """Import diffusers' `AutoencoderKL`; it takes seconds, so only where it is needed."""
    from diffusers import AutoencoderKL

    return AutoencoderKL
