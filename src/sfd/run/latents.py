"""The latents of a run: the stage that encodes them, opening them, and a preview of them decoded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfd.data.encode import LatentWriter
from sfd.data.grid import image_grid
from sfd.data.images import to_uint8
from sfd.data.published import PublishedLatents
from sfd.data.shards import MANIFEST, LatentSet, read_manifest
from sfd.encoders import TextureEncoder
from sfd.latents import TEXTURE
from sfd.run.encoders import CompressorStage, EncoderStage
from sfd.run.images import RunImages
from sfd.run.recipe import Recipe, load_recipe
from sfd.run.stages import Run, RunFolder, Stage
from sfd.run.validate import planned_shapes
from sfd.utils import files
from sfd.utils.device import full_float32

PREVIEW_IMAGES, PREVIEW_COLUMNS = 32, 8


class LatentsStage(Stage[Run]):
    """Encodes the training images into latent shards, or checks published ones."""

    def __init__(
        self, run: Run, images: RunImages, texture: EncoderStage, semantic: EncoderStage, compressor: CompressorStage
    ) -> None:
        self.images, self.texture, self.semantic, self.compressor = images, texture, semantic, compressor
        self.sources, self.published = (texture, semantic, compressor), run.recipe.latents.published
        self.together = self.published is None
        fields = ("data", "latents") if self.together else ()
        super().__init__(run, "latents", "sfd prepare", run.folder.latents, fields)
        self.fields["published latents"] = self.published is not None

    @cached_property
    def _source(self) -> LatentWriter | PublishedLatents:
        recipe = self.run.recipe
        if self.published is not None:
            return PublishedLatents(Path(self.published), self.texture.encoder, recipe.data.classes, self.folder)
        texture = self.texture.encoder
        semantic = self.semantic.encoder if recipe.encodes_semantics else None
        compressor = self.compressor.compressor if recipe.compresses_semantics else None
        images, device = self.images.training, self.run.device
        return LatentWriter(images, texture, semantic, compressor, self.folder, recipe.latents, device)

    def inputs(self) -> Mapping[str, Any]:
        """Images and encoders, or the published shards."""
        return self._source.inputs()

    def results(self) -> list[Path]:
        """The manifest, and the shards that it lists."""
        manifest = self.folder / MANIFEST
        if self.published is not None or not manifest.exists():
            return [manifest]
        return [manifest, *(self.folder / shard.file for shard in read_manifest(self.folder).shards)]

    def work(self) -> None:
        """Encode the images, or check published shards."""
        planned_shapes(self.run.recipe)  # refuses published latents that do not fit the recipe
        self._source.write()

    @cached_property
    def latents(self) -> LatentSet:
        """The latents to train on."""
        self.require()
        return open_latents(self.run.recipe, self.run.folder)


def open_latents(recipe: Recipe, folder: RunFolder) -> LatentSet:
    """Open a run's latents: its own, or published ones with the statistics that the run stores."""
    published = recipe.latents.published
    return LatentSet(folder.latents) if published is None else LatentSet(published, read_manifest(folder.latents))


def find_latents(folder: Path) -> LatentSet:
    """Open the latents of a run's folder, or a folder of latents itself."""
    recipe = folder / "recipe.yaml"
    return open_latents(load_recipe(recipe), RunFolder(folder)) if recipe.exists() else LatentSet(folder)


@torch.no_grad()
@full_float32()
def write_real_preview(path: Path, latents: LatentSet, texture: TextureEncoder, device: torch.device) -> None:
    """Decode some latents of real images into a grid; noise means that another encoder made them."""
    chosen = np.unique(np.linspace(0, len(latents) - 1, PREVIEW_IMAGES).astype(np.int64))
    raw = latents.read(TEXTURE, chosen, np.zeros(len(chosen), bool)).to(device)
    with files.atomic_write(path, shared=True) as partial:
        image_grid(to_uint8(texture.decode(raw)), columns=PREVIEW_COLUMNS).save(partial, "PNG")
