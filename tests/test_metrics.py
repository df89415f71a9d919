from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from sfd.evaluation.metrics import (
    Gaussian,
    GaussianAccumulator,
    frechet_distance,
    gaussian,
    inception_score,
    precision_recall,
)
from sfd.utils.errors import SFDError

GOLDEN = Path(__file__).parent / "golden"
TENSORS = load_file(GOLDEN / "metrics.io.safetensors")
REFERENCE, SAMPLES = TENSORS["reference_features"], TENSORS["sample_features"]


def random_gaussian(rng, size, rank=None):
    factor = rng.normal(size=(size, rank or size))
    return Gaussian(rng.normal(size=size), factor @ factor.T, 100)


@given(size=st.integers(1, 8), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form(size, seed):
    rng = np.random.default_rng(seed)
    means, deviations = rng.normal(size=(2, size)), rng.uniform(0, 3, size=(2, size))
    a, b = (Gaussian(m, np.diag(d**2), 10) for m, d in zip(means, deviations, strict=True))
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7, abs=1e-7)


@given(size=st.integers(1, 8), rank=st.integers(1, 8), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_frechet_distance_is_symmetric_and_does_not_change_under_rotation(size, rank, seed):
    rng = np.random.default_rng(seed)
    a, b = random_gaussian(rng, size, rank), random_gaussian(rng, size)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T, g.count) for g in (a, b)]
    distance = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-6, abs=1e-5)
    assert frechet_distance(turned[0], turned[1]) == pytest.approx(distance, rel=1e-6, abs=1e-5)


def test_frechet_distance_of_singular_covariances_is_real_and_zero_to_itself():
    few = gaussian(np.random.default_rng(0).normal(size=(5, 32)))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


@given(cuts=st.lists(st.integers(0, 400), max_size=6), offset=st.sampled_from([0.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_moments_do_not_depend_on_the_batches(cuts, offset):
    features = REFERENCE.astype(np.float64) + offset
    moments = GaussianAccumulator()
    for part in np.split(features, sorted(cuts)):
        moments.update(part)
    result = moments.gaussian()
    np.testing.assert_allclose(result.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 350])
def test_precision_and_recall_do_not_depend_on_the_chunk(chunk):
    assert precision_recall(REFERENCE, SAMPLES, chunk=chunk) == precision_recall(REFERENCE, SAMPLES)


def test_precision_and_recall_of_samples_at_one_point_of_the_reference():
    samples = np.repeat(REFERENCE[:1], 10, axis=0)
    result = precision_recall(REFERENCE, samples)
    assert result.precision == 1
    assert result.recall <= 1 / len(REFERENCE)


def test_inception_score_of_sure_and_balanced_classes_is_their_number():
    assert inception_score(np.tile(np.eye(7), (3, 1))) == pytest.approx(7)


def test_inception_score_is_the_mean_over_splits():
    sure = np.eye(6)
    assert inception_score(sure, split_size=2) == pytest.approx(2)
    assert inception_score(sure, split_size=4) == pytest.approx((4 + 2) / 2)  # the last split is shorter


def test_precision_and_recall_of_points_on_a_line():
    reference = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])  # distances to the third neighbour: 3, 2, 2, 3, 9
    samples = np.array([[-3.1], [5.9], [6.5], [19.1], [20.0]])  # 9.6, 9, 9.6, 13.2, 14.1
    found = precision_recall(reference, samples, k=3)
    assert found == pytest.approx((2 / 5, 1))  # -3.1 is 3.1 from 0, 19.1 is 9.1 from 10, 20 is 10 from 10


def test_features_of_other_extractors_are_refused():
    with pytest.raises(SFDError, match="32 and 16 dimensions"):
        frechet_distance(gaussian(REFERENCE), gaussian(SAMPLES[:, :16]))


def test_one_image_has_no_covariance():
    with pytest.raises(SFDError, match="at least 2 images"):
        gaussian(REFERENCE[:1])
