"""Image files, archives of them, and images without classes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from sfd.data.shapes import ShapesSource


def put(path: Path, colour: tuple[int, int, int] = (9, 8, 7), size: tuple[int, int] = (12, 10)) -> Path:
    """Write an image of one colour; PNG unless the suffix is another format's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".avif": "AVIF", ".bmp": "BMP"}.get(path.suffix, "PNG")
    Image.new("RGB", size, colour).save(path, kind)
    return path


def pack(folder: Path, archive: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """Zip the content of a folder."""
    with zipfile.ZipFile(archive, "w", compression) as target:
        for path in sorted(folder.rglob("*")):
            target.write(path, prefix + path.relative_to(folder).as_posix())
    return archive


class Unlabelled(ShapesSource):
    """Shapes without classes."""

    def __init__(self, count: int, image_size: int = 32) -> None:
        super().__init__(count, 0, image_size)
        self.classes = ()

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int64)
