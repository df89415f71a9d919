"""The images of a run: those that it trains on, and those that are held out."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from sfd.data.cache import cached
from sfd.data.folder import skipped_report
from sfd.data.images import ImageSource
from sfd.data.source import open_source
from sfd.data.split import split
from sfd.evaluation.extractors.classifier import check_data
from sfd.run.stages import Run
from sfd.utils import files


class RunImages:
    """Opened when a stage first needs them; in memory where they fit."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def training(self) -> ImageSource:
        """Images that encoders and the transformer are trained on."""
        return self._opened[0]

    @property
    def held_out(self) -> ImageSource:
        """Images for evaluation alone."""
        return self._opened[1]

    def identity(self) -> dict[str, Any]:
        """Identity of the images, independent of where they are stored."""
        return {"identity of the images in data.source": self.training.identity}

    @cached_property
    def _opened(self) -> tuple[ImageSource, ImageSource]:
        recipe, folder = self._run.recipe, self._run.folder
        opened = open_source(recipe.data, folder.checked)
        training, held_out = split(cached(opened), recipe.data.holdout, recipe.data.seed)
        if recipe.evaluation.classifier is not None:
            check_data(held_out, recipe.evaluation.classifier)
        skipped = skipped_report(opened)
        if skipped:
            files.write_text(folder.skipped, skipped, shared=True)
        else:
            folder.skipped.unlink(missing_ok=True)
        return training, held_out
