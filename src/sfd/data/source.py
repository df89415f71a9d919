"""The data set that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from sfd.data.folder import FolderSource
from sfd.data.images import ImageSource
from sfd.data.shapes import ShapesSource
from sfd.utils.config import Free, PathText, Settings
from sfd.utils.errors import SFDError


class DataSettings(Settings):
    """Which images, at what size, and how many of them are held out."""

    source: Free[PathText | None] = Field(
        None,
        min_length=1,
        description='a folder or zip of images, or "shapes" (a folder of that name: "./shapes"); '
        "null: none, where the latents are published and nothing is measured",
    )
    image_size: int = Field(32, gt=0, description="rows and columns; images are scaled and centre-cropped to it")
    count: int = Field(20000, gt=0, description="number of images; shapes only")
    holdout: float = Field(0.5, ge=0, lt=1, description="share kept from training, for evaluation")
    seed: int = Field(0, ge=0, description="of the shapes drawn and of the images held out")
    classes: Free[int | None] = Field(
        None, gt=0, description="how many the images must have; null: as many as they have, which only the data tell"
    )
    strict: Free[bool] = Field(False, description="refuse what would be skipped: broken files, empty classes")

    def fixed(self) -> dict[str, Any]:
        """Leave out the count where it does not apply. The source is free: its identity is compared, not its name."""
        fields = super().fixed()
        return fields if self.source == "shapes" else {name: v for name, v in fields.items() if name != "count"}


def open_source(settings: DataSettings, memory: Path | None = None) -> ImageSource:
    """Open the whole data set, before `split` divides it. `memory`: see FolderSource."""
    source: ImageSource
    if settings.source is None:
        raise SFDError("this takes images, but the recipe names none; give data.source=FOLDER")
    if settings.source == "shapes":
        source = ShapesSource(settings.count, settings.seed, settings.image_size)
    else:
        source = FolderSource(settings.source, settings.image_size, strict=settings.strict, memory=memory)
    check_classes(settings, len(source.classes), settings.source)
    return source


def check_classes(settings: DataSettings, found: int, where: str) -> None:
    """Refuse data that have another number of classes than the recipe says."""
    if settings.classes is not None and found != settings.classes:
        raise SFDError(
            f"data.classes is {settings.classes}, but {where} has {found} classes; give the data that the recipe is "
            f"for, or set data.classes={found or 'null'}"
        )
