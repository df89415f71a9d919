"""Many images as one picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sfd.utils.errors import SFDError

GAP = 1  # pixels between the images, before scaling

SHOWN = 96  # pixels: what an eye makes out on a screen


def image_grid(images: np.ndarray, columns: int, scale: int | None = None) -> Image.Image:
    """Lay images out row by row.

    Args:
        images: uint8 (N, H, W, 3).
        columns: images in a row.
        scale: how often a pixel is repeated in each direction; None: until an image has about 96 rows.

    Returns:
        A picture with transparent gaps, also where the last row is short.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise SFDError(f"a grid takes uint8 images (N, H, W, 3), got {images.dtype} {images.shape}")
    count, height, width = images.shape[:3]
    scale = max(1, SHOWN // height) if scale is None else scale
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4), np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * (height + GAP), place % columns * (width + GAP)
        canvas[top : top + height, left : left + width, :3] = image
        canvas[top : top + height, left : left + width, 3] = 255
    return Image.fromarray(canvas.repeat(scale, axis=0).repeat(scale, axis=1), "RGBA")
