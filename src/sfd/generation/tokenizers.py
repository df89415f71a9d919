"""The encoders in a model directory: images to the streams that it generates, and texture back to images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfd.data.images import to_tensor
from sfd.encoders import SemanticEncoder, TextureEncoder, open_semantic, open_texture, save_semantic, semantic_identity
from sfd.generation.directory import COMPRESSOR_FOLDER, SEMANTIC_FOLDER, TEXTURE_FOLDER
from sfd.latents import SEMANTIC, TEXTURE, CompositeLatent
from sfd.models.component import Component
from sfd.models.compressor import Compressor, load_compressor
from sfd.utils.device import full_float32
from sfd.utils.errors import SFDError

ENCODED_AT_ONCE = 32  # images


class Tokenizers(NamedTuple):
    """The texture encoder, and what makes the semantic stream where that is kept."""

    texture: TextureEncoder
    semantic: SemanticEncoder | None
    compressor: Compressor | None

    def check(self, composite: CompositeLatent, where: str) -> None:
        """Refuse other encoders than those that made the latents: the result would be noise."""
        given = {TEXTURE: self.texture.identity}
        if self.semantic is not None and self.compressor is not None:
            given[SEMANTIC] = semantic_identity(self.semantic, self.compressor)
        for stream in composite.streams:
            found = given.get(stream.name, "")
            if "" not in (stream.tokenizer, found) and stream.tokenizer != found:
                raise SFDError(
                    f"{where}: the {stream.name} latents were made by tokenizer {stream.tokenizer}, but the one here "
                    f"is {found}; use the one that the latents were prepared with"
                )

    @torch.no_grad()
    @full_float32()
    def encode(
        self, images: np.ndarray | Sequence[Image.Image], composite: CompositeLatent, device: torch.device
    ) -> Tensor:
        """Encode uint8 images (B, S, S, 3) to packed, normalised latents (B, N) on `device`; see `Model.encode`."""
        pixels = np.stack([np.asarray(image) for image in images])
        side = composite[TEXTURE].grid * self.texture.downsample
        if pixels.shape[1:] != (side, side, 3) or pixels.dtype != np.uint8:
            raise SFDError(
                f"this model encodes uint8 images (B, {side}, {side}, 3), but {pixels.dtype} {pixels.shape} was given; "
                "convert them to RGB, and resize and crop them"
            )
        semantic = self.semantic.to(device) if self.semantic is not None else None
        compressor = self.compressor.to(device) if self.compressor is not None else None
        if SEMANTIC in composite.names and (semantic is None or compressor is None):
            raise SFDError("this model does not keep its semantic encoder and compressor, which encoding needs")
        latents = []
        for batch in to_tensor(pixels).to(device).split(ENCODED_AT_ONCE):
            raw = {TEXTURE: self.texture.encode(batch)}
            if compressor is not None and semantic is not None:
                raw[SEMANTIC] = compressor.encode(semantic.encode(batch))
            latents.append(composite.pack(composite.normalize(raw)))
        return torch.cat(latents)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the encoders into a model directory, weights as `dtype`."""
        cast(Component, self.texture).save(folder / TEXTURE_FOLDER, dtype)
        if self.semantic is not None and self.compressor is not None:
            save_semantic(self.semantic, folder / SEMANTIC_FOLDER, dtype)
            self.compressor.save(folder / COMPRESSOR_FOLDER, dtype)


def load_tokenizers(folder: Path) -> Tokenizers:
    """Load the encoders of a model directory, on the CPU."""
    texture = open_texture(folder / TEXTURE_FOLDER)
    if not (folder / COMPRESSOR_FOLDER).is_dir():
        return Tokenizers(texture, None, None)
    return Tokenizers(texture, open_semantic(folder / SEMANTIC_FOLDER), load_compressor(folder / COMPRESSOR_FOLDER))
