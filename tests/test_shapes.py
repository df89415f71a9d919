"""The shapes data set: independent factors, image i from seed and i alone, distinct shapes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfd.data.shapes import ShapesSource, render
from sfd.utils.errors import SFDError


@pytest.fixture(scope="module")
def source() -> ShapesSource:
    return ShapesSource(4000, seed=3)


def silhouette(
    source: ShapesSource, shape: int, rotation: float = 0.0, size: int = 64, x: float = 0.0, y: float = 0.0
) -> np.ndarray:
    """A shape in white on black."""
    factors = source.factors([0]).copy()
    for name, value in (("shape", shape), ("x", x), ("y", y), ("radius", 0.33), ("rotation", rotation)):
        factors[name] = value
    for layer, colour in (("figure", 1), ("ground", 0)):
        factors[layer]["pattern"] = 0
        factors[layer]["colours"] = colour
    return render(factors, size)[0, :, :, 0] / 255


def test_images_and_labels(source: ShapesSource) -> None:
    images = source.load([0, 5, 2])
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
    assert (len(source), len(source.classes)) == (4000, 10)
    assert np.array_equal(source.labels, source.factors(range(4000))["shape"])
    assert np.array_equal(ShapesSource(7, seed=3).load(range(7)), source.load(range(7)))
    assert not np.array_equal(ShapesSource(7, seed=4).load(range(7)), source.load(range(7)))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 3999), min_size=1, max_size=90))
def test_an_image_does_not_depend_on_its_batch(indices: list[int]) -> None:
    source = ShapesSource(4000, seed=3)
    assert np.array_equal(source.load(indices)[-1], source.load(indices[-1:])[0])


def test_identity_depends_on_count_seed_and_size() -> None:
    variants = [ShapesSource(5, 0), ShapesSource(6, 0), ShapesSource(5, 1), ShapesSource(5, 0, image_size=16)]
    assert len({variant.identity for variant in variants}) == 4
    assert ShapesSource(5, 0).identity == variants[0].identity


def test_factors_are_independent(source: ShapesSource) -> None:
    factors = source.factors(range(len(source)))
    columns = [
        *(factors[name] for name in ("shape", "x", "y", "radius", "rotation")),
        *(factors[layer][name] for layer in ("figure", "ground") for name in ("pattern", "angle", "period")),
        factors["figure"]["colours"][:, 0, 0],
    ]
    correlation = np.corrcoef(np.stack([np.asarray(c, float) for c in columns]))
    assert np.abs(correlation - np.eye(len(columns))).max() < 5 / np.sqrt(len(source))


def test_position_and_area_of_a_disk(source: ShapesSource) -> None:
    disk = silhouette(source, 0, size=32, x=3 / 32, y=-2 / 32)
    y, x = np.mgrid[:32, :32] + 0.5 - 16
    assert (disk * x).sum() / disk.sum() == pytest.approx(3, abs=0.02)
    assert (disk * y).sum() / disk.sum() == pytest.approx(-2, abs=0.02)
    assert disk.sum() == pytest.approx(np.pi * (0.9 * 0.33 * 32) ** 2, rel=0.01)
    for shape in range(10):
        image = silhouette(source, shape, size=32)
        assert max(image[0].max(), image[-1].max(), image[:, 0].max(), image[:, -1].max()) < 0.5, "inside the image"


@pytest.mark.parametrize("shape", range(10))
def test_mirroring_a_shape_negates_its_rotation(source: ShapesSource, shape: int) -> None:
    mirrored = silhouette(source, shape, 0.3)[:, ::-1]
    assert np.abs(mirrored - silhouette(source, shape, -0.3)).max() < 0.02


def test_no_two_shapes_coincide_at_any_rotation(source: ShapesSource) -> None:
    turns = np.linspace(-np.pi / 6, np.pi / 6, 5)
    views = [[silhouette(source, shape, turn) for turn in turns] for shape in range(10)]
    for a, b in itertools.combinations(range(10), 2):
        overlap = max(np.minimum(v, w).sum() / np.maximum(v, w).sum() for v in views[a] for w in views[b])
        assert overlap < 0.86, (source.classes[a], source.classes[b], overlap)


def test_shape_and_background_always_differ(source: ShapesSource) -> None:
    factors = source.factors(range(len(source)))
    luminance = [factors[layer]["colours"] @ np.array([0.2126, 0.7152, 0.0722]) for layer in ("figure", "ground")]
    light, dark = np.maximum(*luminance).min(1), np.minimum(*luminance).max(1)
    assert (light - dark).min() > 0.1


def test_a_too_small_size_is_refused() -> None:
    with pytest.raises(SFDError, match="shapes: "):
        ShapesSource(5, 0, image_size=4)
