"""What an encoder is, and how one is loaded from its folder.

An encoder `NAME` is the module `sfd/encoders/NAME.py`. It has a `Config`, a function `build(config)` that gives a
`Component` with fresh weights and, if published weights can be used, functions `planned` and `pretrained`. How one is
trained is no part of it (see `sfd.training.tasks`). See docs/extending-encoders.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor

from sfd.models import component
from sfd.models.component import Component
from sfd.utils import files, registry
from sfd.utils.errors import SFDError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PACKAGE = "sfd.encoders"
TEXTURE, SEMANTIC = "texture encoder", "semantic encoder"


class SemanticEncoder(Protocol):
    """Says what is where in an image. Encoding is deterministic and keeps no gradient."""

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
    """Keeps what pixels can be decoded from; `encode` gives latents (B, C, H / f, W / f)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents (B, C, h, w) back to images (B, 3, h·f, w·f), about [-1, 1]; clamping is left to the caller."""


def load_encoder(folder: Path) -> Component:
    """Load the encoder in `folder`, in eval mode, without gradients, on the CPU.

    Its `kind` (`TEXTURE` or `SEMANTIC`) says which of the two protocols it fulfils.

    Raises:
        SFDError: the folder holds no encoder, one that this version does not know, or damaged weights.
    """
    return component.load(folder, (TEXTURE, SEMANTIC), lambda name: registry.find(PACKAGE, name, "encoder"))


def load_texture_encoder(folder: Path) -> TextureEncoder:
    """Load an encoder that can decode.

    Raises:
        SFDError: as `load_encoder`, or the folder holds a semantic encoder.
    """
    return cast(TextureEncoder, _of_kind(folder, TEXTURE))


def load_semantic_encoder(folder: Path) -> SemanticEncoder:
    """Load an encoder of what is where.

    Raises:
        SFDError: as `load_encoder`, or the folder holds a texture encoder.
    """
    return cast(SemanticEncoder, _of_kind(folder, SEMANTIC))


def open_texture(source: str) -> TextureEncoder:
    """Open a texture encoder, in eval mode, without gradients, on the CPU.

    Args:
        source: the folder of a part, a folder in diffusers' format, or a hub name (see `sfd.encoders.kl`).

    Raises:
        SFDError: there is none, it cannot be had, or it is damaged.
    """
    return cast(TextureEncoder, _open(source, TEXTURE, "kl"))


def open_semantic(source: str) -> SemanticEncoder:
    """Open a semantic encoder, in eval mode, without gradients, on the CPU.

    Args:
        source: the folder of a part, a folder in transformers' format, or a hub name (see `sfd.encoders.vit`).

    Raises:
        SFDError: there is none, it cannot be had, or it is damaged.
    """
    return cast(SemanticEncoder, _open(source, SEMANTIC, "vit"))


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Import diffusers or transformers as if torchvision were not installed.

    They import it where they find it, though nothing here uses it, and one that was built for another PyTorch would
    fail. What they found stays so for the whole process; torchvision itself can be imported afterwards.
    """
    if "torchvision" in sys.modules:
        yield
        return
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torchvision"]


def autoencoder(**shape: Any) -> AutoencoderKL:
    """Make diffusers' `AutoencoderKL` with fresh weights."""
    # Imported here because it takes seconds, which whoever only lists encoders should not wait for.
    with without_torchvision():
        from diffusers import AutoencoderKL

    return AutoencoderKL(**shape)


def _open(source: str, kind: str, published: str) -> Component:
    config = Path(source) / component.CONFIG_FILE
    if config.is_file() and "kind" in files.read_json(config, kind):
        return _of_kind(Path(source), kind)
    return cast(Component, registry.find(PACKAGE, published, "encoder").pretrained(source, {}))


def _of_kind(folder: Path, kind: str) -> Component:
    encoder = load_encoder(folder)
    if encoder.kind != kind:
        raise SFDError(f"{folder} holds a {encoder.kind} ({encoder.name}), but a {kind} was expected")
    return encoder


def check_divisible(images: Tensor, downsample: int) -> None:
    """Refuse images whose sides are no multiple of `downsample`.

    Raises:
        SFDError: a side is not.
    """
    height, width = images.shape[-2:]
    if height % downsample or width % downsample:
        raise SFDError(
            f"images of {height}×{width} do not fit an encoder that shrinks them by {downsample}; "
            f"choose an image size that is a multiple of {downsample}"
        )
