"""What published extractors compare samples with: a folder of images, or an `.npz` of images, moments, or both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfd.data.folder import FolderSource
from sfd.evaluation.evaluate import Protocol, Reference
from sfd.evaluation.extractors import inception
from sfd.evaluation.extractors._base import Extraction, Extractor
from sfd.evaluation.metrics import Gaussian, gaussian
from sfd.evaluation.npz import IMAGES, Npz, NpzImages, read_moments
from sfd.evaluation.samples import Images
from sfd.utils.errors import SFDError


@dataclass(frozen=True)
class RealImages:
    """A reference as it lies on disk. At least one of images and moments is there."""

    name: str
    identity: str
    images: Images | None
    moments: Gaussian | None = None  # of Inception's pooled features
    spatial: Gaussian | None = None  # of its spatial ones


def open_reference(path: Path, image_size: int, extractor: str) -> RealImages:
    """Open what samples of `image_size` are to be compared with.

    A folder's images are scaled and cropped to that size, as training images are. Moments in an `.npz` are Inception's,
    and other extractors pass them over.

    Raises:
        SFDError: it is missing, damaged, or has nothing that the extractor can use.
    """
    if not path.is_file():
        source = FolderSource(path, image_size)
        return RealImages(path.name, source.identity, source)
    npz = Npz(path)
    images = NpzImages(npz) if IMAGES in npz.names else None
    moments = spatial = None
    if extractor == inception.NAME:
        moments = _gaussian(npz, "mu", "sigma", inception.FEATURES)
        spatial = _gaussian(npz, "mu_s", "sigma_s", inception.SPATIAL)
    if images is None and moments is None:
        needed = "arr_0 (images) nor mu and sigma (moments)" if extractor == inception.NAME else "arr_0 (images)"
        raise SFDError(f"{path} has neither {needed}, only {', '.join(npz.names) or 'nothing'}; give another reference")
    if images is not None and images.image_size != image_size:
        raise SFDError(
            f"the samples are {image_size}×{image_size} pixels, the reference {path} is "
            f"{images.image_size}×{images.image_size}; compare images of one size"
        )
    return RealImages(path.name, npz.identity, images, moments, spatial)


def measured(real: RealImages, extractor: Extractor, seen: Extraction | None) -> Reference:
    """Make a reference of its stored moments, if it has any, and of what the extractor saw in its images."""
    if real.moments is not None:
        # Without stored spatial moments there is no sFID: those of fewer images would pass for them.
        statistics, spatial = real.moments, real.spatial
    else:
        assert seen is not None
        statistics = gaussian(seen.features)
        spatial = None if seen.spatial is None else gaussian(seen.spatial)
    protocol = Protocol(
        reference=real.name,
        reference_identity=real.identity,
        reference_count=0 if seen is None else len(seen.features),
        stored_moments=real.moments is not None,
        extractor=extractor.name,
        extractor_identity=extractor.identity,
        extractor_task=extractor.task,
        extractor_accuracy=extractor.accuracy,
    )
    return Reference(extractor, protocol, (), None if seen is None else seen.features, statistics, spatial)


def _gaussian(npz: Npz, mean: str, covariance: str, size: int) -> Gaussian | None:
    moments = read_moments(npz, mean, covariance, size)
    return None if moments is None else Gaussian(*moments, count=0)
