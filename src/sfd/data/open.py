"""The data set that a recipe names."""

from __future__ import annotations

from pydantic import Field

from sfd.data.folder import FolderSource
from sfd.data.images import ImageSource
from sfd.data.shapes import ShapesSource
from sfd.settings import Settings


class DataSettings(Settings):
    """Which images, at what size, and how many of them are held out."""

    source: str = Field(
        min_length=1, description='a folder or zip of images, or "shapes" (a folder of that name: "./shapes")'
    )
    image_size: int = Field(32, gt=0, description="rows and columns; images are scaled and centre-cropped to it")
    count: int = Field(20000, gt=0, description="number of images; shapes only")
    holdout: float = Field(0.5, ge=0, lt=1, description="share kept from training, for evaluation")
    seed: int = Field(0, ge=0, description="of the shapes drawn and of the images held out")
    strict: bool = Field(False, description="stop at a broken file in place of skipping it")


def open_source(settings: DataSettings) -> ImageSource:
    """Open the whole data set, before `sfd.data.split.split` divides it.

    Raises:
        SFDError: it cannot be used; see FolderSource and ShapesSource.
    """
    if settings.source == "shapes":
        return ShapesSource(settings.count, settings.seed, settings.image_size)
    return FolderSource(settings.source, settings.image_size, strict=settings.strict)
