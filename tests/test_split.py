"""Splits are stratified, disjoint, complete and reproducible; cached sources equal their sources."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfd.data.cache import cached
from sfd.data.shapes import ShapesSource
from sfd.data.split import Subset, split
from sfd.utils.errors import SFDError


def of_labels(labels: list[int]) -> Subset:
    """Shapes with these labels."""
    source = ShapesSource(300, 0)
    pools = [iter(np.flatnonzero(source.labels == label)) for label in range(10)]
    return Subset(source, np.array([next(pools[label]) for label in labels]))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 5), st.lists(st.integers(2, 9), min_size=10, max_size=10))
def test_every_class_is_on_both_sides_in_proportion(holdout: float, seed: int, counts: list[int]) -> None:
    source = of_labels([label for label, count in enumerate(counts) for _ in range(count)])
    training, held_out = split(source, holdout, seed)
    assert isinstance(training, Subset)
    assert isinstance(held_out, Subset)
    assert sorted([*training.indices, *held_out.indices]) == list(range(len(source)))
    for label, count in enumerate(counts):
        kept = int((held_out.labels == label).sum())
        assert 1 <= kept <= count - 1
        assert abs(kept - holdout * count) < 1.01 or kept in (1, count - 1)


def test_a_subset_has_the_images_of_its_indices() -> None:
    source = ShapesSource(50, 0)
    subset = Subset(source, np.array([7, 3, 44]))
    assert np.array_equal(subset.load([2, 0]), source.load([44, 7]))
    assert np.array_equal(subset.labels, source.labels[[7, 3, 44]])
    many = ShapesSource(200, 0)
    identities = [part.identity for seed in (1, 2) for part in split(many, 0.5, seed)]
    assert len(set(identities)) == 4 and split(many, 0.5, 1)[0].identity == identities[0]


def test_without_holdout_all_images_are_for_training() -> None:
    source = ShapesSource(20, 0)
    training, held_out = split(source, 0, 0)
    assert training is source
    assert len(held_out) == 0
    assert held_out.load([]).shape == (0, 32, 32, 3)


def test_all_classes_with_one_image_are_named_at_once() -> None:
    source = of_labels([0, 0, *[k for k in range(3, 10) for _ in range(2)], 1, 2])
    with pytest.raises(SFDError, match=r"needs at least 2 images.*'ring', 'square'"):
        split(source, 0.5, 0)
    assert len(split(source, 0, 0)[0]) == len(source)


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(holdout: float) -> None:
    with pytest.raises(SFDError, match="holdout is"):
        split(ShapesSource(50, 0), holdout, 0)


def test_a_cached_source_equals_its_source() -> None:
    source = ShapesSource(600, 0)
    kept = cached(source)
    assert kept.resident
    assert (kept.identity, kept.classes, len(kept)) == (source.identity, source.classes, 600)
    assert np.array_equal(kept.load([3, 599, 3]), source.load([3, 599, 3]))
    kept.load([0])[:] = 0
    assert kept.load([0]).any(), "loaded images are copies"
    assert cached(source, budget=600 * 32 * 32 * 3 - 1) is source
