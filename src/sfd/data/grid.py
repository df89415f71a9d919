"""Many images as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfd.utils.errors import SFDError

GAP = 1  # pixels between the images, before scaling
SHOWN = 96  # pixels: what an eye makes out on a screen
TEXT, GREY = 14, (128, 128, 128, 255)  # size in pixels of a label, and its colour, which reads on white and on black


def image_grid(
    images: np.ndarray,
    columns: int,
    scale: int | None = None,
    *,
    labels: Sequence[str] = (),
    places: Sequence[int] | None = None,
) -> Image.Image:
    """Lay images out row by row.

    Args:
        images: uint8 (N, H, W, 3).
        columns: images in a row.
        scale: how often a pixel is repeated in each direction; None: until an image has about 96 rows.
        labels: text at the left of each row; none where all are empty.
        places: the cell of each image, counted row by row; None: one after another.

    Returns:
        A picture with transparent gaps, also in cells without an image.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise SFDError(f"a grid takes uint8 images (N, H, W, 3), got {images.dtype} {images.shape}")
    count, height, width = images.shape[:3]
    scale = max(1, SHOWN // height) if scale is None else scale
    places = range(count) if places is None else places
    rows = max(places) // columns + 1
    canvas = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4), np.uint8)
    for place, image in zip(places, images, strict=True):
        top, left = place // columns * (height + GAP), place % columns * (width + GAP)
        canvas[top : top + height, left : left + width, :3] = image
        canvas[top : top + height, left : left + width, 3] = 255
    grid = Image.fromarray(canvas.repeat(scale, axis=0).repeat(scale, axis=1), "RGBA")
    return _with_labels(grid, labels, (height + GAP) * scale, height * scale) if any(labels) else grid


def _with_labels(grid: Image.Image, labels: Sequence[str], pitch: int, height: int) -> Image.Image:
    """Put a label left of each row, right-aligned; one that is too long is cut to the width of two rows."""
    font = ImageFont.load_default(min(TEXT, height))
    shortened = []
    for label in labels:
        short = label
        while len(short) > 1 and font.getlength(short) > 2 * SHOWN:
            short = short[:-2] + "…"
        shortened.append(short)
    margin = round(max(map(font.getlength, shortened))) + TEXT
    picture = Image.new("RGBA", (margin + grid.width, grid.height))
    picture.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, label in enumerate(shortened):
        draw.text((margin - TEXT / 2, row * pitch + height / 2), label, fill=GREY, font=font, anchor="rm")
    return picture
