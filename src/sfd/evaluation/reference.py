"""The real images that samples are compared with, as an extractor sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sfd.data.folder import FolderSource
from sfd.data.images import Images
from sfd.evaluation.extractors import inception
from sfd.evaluation.extractors._base import Extractor
from sfd.evaluation.features import BATCH, extract
from sfd.evaluation.metrics import Gaussian, gaussian
from sfd.evaluation.npz import IMAGES, Npz, NpzImages, read_moments
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

NEIGHBOURS = 3  # k of precision and recall


class Protocol(Settings):
    """The evaluation protocol: only numbers of equal protocols can be compared."""

    reference: str  # which real images
    reference_identity: str
    reference_count: int  # images of the reference; 0: only moments are known
    stored_moments: bool = False  # Fréchet distances are to moments that came with the reference, of more images
    extractor: str
    extractor_identity: str
    extractor_task: str  # what the extractor was trained to tell
    extractor_images: int | None = None  # images that it was trained on; None: published, or not known
    extractor_accuracy: float | None  # at its task, on images it never saw
    neighbours: int = NEIGHBOURS


@dataclass(frozen=True)
class RealImages:
    """A reference before an extractor sees it: images, moments, or both."""

    name: str
    identity: str
    images: Images | None
    moments: Gaussian | None = None  # of Inception's pooled features
    spatial: Gaussian | None = None  # of its spatial ones


@dataclass(frozen=True)
class Reference:
    """Real images as an extractor sees them, computed once for any number of comparisons."""

    extractor: Extractor
    protocol: Protocol
    features: np.ndarray | None  # (N, D); None if only moments are known
    statistics: Gaussian | None  # None of a single image
    spatial: Gaussian | None  # of spatial features; None if the extractor or the stored moments have none

    @staticmethod
    def of(
        real: RealImages, extractor: Extractor, *, cache: Path | None = None, batch_size: int = BATCH
    ) -> Reference | None:
        """Compute the features of real images; None while other ranks have not written theirs; see `extract`."""
        seen = None
        if real.images is not None:
            seen = extract(real.images, extractor, f"features of {real.name}", cache=cache, batch_size=batch_size)
            if seen is None:
                return None
        protocol = Protocol(
            reference=real.name,
            reference_identity=real.identity,
            reference_count=0 if seen is None else len(seen.features),
            stored_moments=real.moments is not None,
            extractor=extractor.name,
            extractor_identity=extractor.identity,
            extractor_task=extractor.task,
            extractor_images=extractor.trained_on,
            extractor_accuracy=extractor.accuracy,
        )
        features = None if seen is None else seen.features
        statistics, spatial = real.moments, real.spatial
        if seen is not None and statistics is None:  # beside stored moments, those of fewer images would mislead
            statistics, spatial = (
                gaussian(x) if x is not None and len(x) > 1 else None for x in (seen.features, seen.spatial)
            )
        return Reference(extractor, protocol, features, statistics, spatial)


def reference_of(images: Images, extractor: Extractor, name: str) -> Reference:
    """Compute a reference in memory; `name` says in a few words which images these are."""
    reference = Reference.of(RealImages(name, images.identity, images), extractor)
    assert reference is not None  # only a cache leaves work to other ranks
    return reference


def open_reference(path: Path, image_size: int, extractor: str) -> RealImages:
    """Open a folder or zip of images, or an `.npz` of images (`arr_0`), moments (`mu`, `sigma`, …), or both.

    A folder's images are scaled and cropped to `image_size`, as training images are. Moments in an `.npz` are
    Inception's, and other extractors ignore them.
    """
    if path.suffix != ".npz":
        source = FolderSource(path, image_size)
        return RealImages(path.name, source.identity, source)
    npz = Npz(path)
    images = NpzImages(npz) if IMAGES in npz.names else None
    pooled = spatial = None
    if extractor == inception.NAME:
        pooled = read_moments(npz, "mu", "sigma", inception.FEATURES)
        spatial = read_moments(npz, "mu_s", "sigma_s", inception.SPATIAL)
    if images is None and pooled is None:
        needed = "arr_0 (images) nor mu and sigma (moments)" if extractor == inception.NAME else "arr_0 (images)"
        raise SFDError(f"{path} has neither {needed}, only {', '.join(npz.names) or 'nothing'}; give another reference")
    if images is not None and images.image_size != image_size:
        raise SFDError(
            f"the samples are {image_size}×{image_size} pixels, the reference {path} is "
            f"{images.image_size}×{images.image_size}; compare images of one size"
        )
    return RealImages(path.name, npz.identity, images, pooled, spatial)
