"""The latents of a run, and a preview of them decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sfd.data.grid import image_grid
from sfd.data.images import to_uint8
from sfd.data.shards import LatentSet, read_manifest
from sfd.encoders import TextureEncoder
from sfd.latents import TEXTURE
from sfd.run.recipe import Recipe, load_recipe
from sfd.run.stages import RunFolder
from sfd.utils import files
from sfd.utils.device import full_float32

PREVIEW_IMAGES, PREVIEW_COLUMNS = 32, 8


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
