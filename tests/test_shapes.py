"""The shapes data set: known, independent factors; image i from seed and i alone; distinct shapes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfd.data.shapes import PATTERNS, ShapesSource, render
from sfd.utils.errors import SFDError


@pytest.fixture(scope="module")
def source() -> ShapesSource:
    return ShapesSource(4000, seed=3)


def silhouette(source: ShapesSource, shape: int, rotation: float = 0.0, size: int = 64) -> np.ndarray:
    """One shape in white on black, centred."""
    factors = source.factors([0]).copy()
    for name, value in (("shape", shape), ("x", 0), ("y", 0), ("radius", 0.33), ("rotation", rotation)):
        factors[name] = value
    for layer, colour in (("figure", 1), ("ground", 0)):
        factors[layer]["pattern"] = 0
        factors[layer]["colours"] = colour
    return render(factors, size)[0, :, :, 0] / 255


def test_images_are_what_they_are_called(source: ShapesSource) -> None:
    images = source.load([0, 5, 2])
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == np.uint8
    assert len(source) == 4000
    assert len(source.classes) == 10
    assert source.labels.dtype == np.int64
    assert np.array_equal(source.labels, source.factors(range(4000))["shape"])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 3999), min_size=1, max_size=90))
def test_an_image_does_not_depend_on_its_batch(indices: list[int]) -> None:
    source = ShapesSource(4000, seed=3)
    assert np.array_equal(source.load(indices)[-1], source.load(indices[-1:])[0])


def test_an_image_does_not_depend_on_the_count(source: ShapesSource) -> None:
    assert np.array_equal(ShapesSource(7, seed=3).load(range(7)), source.load(range(7)))


def test_another_seed_gives_other_images(source: ShapesSource) -> None:
    assert not np.array_equal(ShapesSource(7, seed=4).load(range(7)), source.load(range(7)))


def test_identity_names_everything_that_matters() -> None:
    variants = [ShapesSource(5, 0), ShapesSource(6, 0), ShapesSource(5, 1), ShapesSource(5, 0, image_size=16)]
    assert len({variant.identity for variant in variants}) == 4
    assert ShapesSource(5, 0).identity == variants[0].identity


def test_classes_are_balanced(source: ShapesSource) -> None:
    counts = np.bincount(source.labels, minlength=10)
    assert abs(counts - 400).max() < 5 * np.sqrt(400)


def test_factors_are_independent(source: ShapesSource) -> None:
    factors = source.factors(range(len(source)))
    columns = [
        *(factors[name] for name in ("shape", "x", "y", "radius", "rotation")),
        *(factors[layer][name] for layer in ("figure", "ground") for name in ("pattern", "angle", "period")),
        factors["figure"]["colours"][:, 0, 0],
    ]
    correlation = np.corrcoef(np.stack([np.asarray(c, float) for c in columns]))
    assert np.abs(correlation - np.eye(len(columns))).max() < 5 / np.sqrt(len(source))


def test_shape_and_pattern_are_independent(source: ShapesSource) -> None:
    factors = source.factors(range(len(source)))
    table = np.zeros((10, len(PATTERNS)))
    np.add.at(table, (factors["shape"], factors["figure"]["pattern"]), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    chi_squared = ((table - expected) ** 2 / expected).sum()
    assert chi_squared < 36 + 5 * np.sqrt(2 * 36)


def test_shapes_stay_inside_the_image(source: ShapesSource) -> None:
    factors = source.factors(range(500)).copy()
    for layer, colour in (("figure", 1), ("ground", 0)):
        factors[layer]["pattern"] = 0
        factors[layer]["colours"] = colour
    images = render(factors, 32)[..., 0]
    border = np.stack([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]])
    assert border.max() < 128


def test_position_is_the_centre(source: ShapesSource) -> None:
    factors = source.factors([0]).copy()
    for name, value in (("shape", 0), ("x", 3 / 32), ("y", -2 / 32)):
        factors[name] = value
    for layer, colour in (("figure", 1), ("ground", 0)):
        factors[layer]["pattern"] = 0
        factors[layer]["colours"] = colour
    disk = render(factors, 32)[0, :, :, 0].astype(float)
    y, x = np.mgrid[:32, :32] + 0.5 - 16
    assert (disk * x).sum() / disk.sum() == pytest.approx(3, abs=0.02)
    assert (disk * y).sum() / disk.sum() == pytest.approx(-2, abs=0.02)
    assert disk.sum() / 255 == pytest.approx(np.pi * (0.9 * float(factors["radius"][0]) * 32) ** 2, rel=0.01)


@pytest.mark.parametrize("shape", range(10))
def test_a_mirrored_shape_is_the_shape_turned_the_other_way(source: ShapesSource, shape: int) -> None:
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


@pytest.mark.parametrize("pattern", range(len(PATTERNS)))
def test_patterns_show_both_colours_unless_solid(source: ShapesSource, pattern: int) -> None:
    factors = source.factors([1]).copy()
    factors["radius"] = 1e-3
    factors["ground"]["pattern"] = pattern
    factors["ground"]["colours"] = np.array([0, 1])[:, None]
    image = render(factors, 32)[0]
    assert image.min() == 0
    assert (image.max() > 240) == (PATTERNS[pattern] != "solid")


def test_a_larger_size_shows_the_same_scene(source: ShapesSource) -> None:
    small = source.load(range(20)).astype(float)
    large = ShapesSource(20, seed=3, image_size=64).load(range(20)).astype(float)
    assert np.abs(large.reshape(20, 32, 2, 32, 2, 3).mean((2, 4)) - small).mean() < 3


@pytest.mark.parametrize(("count", "seed", "size"), [(0, 0, 32), (5, -1, 32), (5, 0, 4)])
def test_bad_arguments_are_explained(count: int, seed: int, size: int) -> None:
    with pytest.raises(SFDError, match="shapes: "):
        ShapesSource(count, seed, size)
