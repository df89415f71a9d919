from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from sfd.evaluation import intervals
from sfd.evaluation.metrics import Gaussian, frechet_distance, gaussian, inception_score, precision_recall
from sfd.utils.errors import SFDError

TENSORS = load_file(Path(__file__).parent / "golden" / "metrics.io.safetensors")
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
def test_frechet_distance_is_symmetric_and_rotation_invariant(size, rank, seed):
    rng = np.random.default_rng(seed)
    a, b = random_gaussian(rng, size, rank), random_gaussian(rng, size)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T, g.count) for g in (a, b)]
    distance = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-6, abs=1e-5)
    assert frechet_distance(turned[0], turned[1]) == pytest.approx(distance, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_of_many_features_are_accurate(offset):
    features = np.tile(REFERENCE, (25, 1)).astype(np.float64) + offset  # more than one block
    result = gaussian(features)
    np.testing.assert_allclose(result.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("copies", [1, 2, 6])
@pytest.mark.parametrize(("count", "size"), [(5, 32), (40, 3), (30, 256)])
def test_a_set_has_distance_zero_and_full_precision_and_recall_to_itself(count, size, copies):
    few = np.random.default_rng(0).normal(loc=3, scale=50, size=(count, size)).astype(np.float32)
    repeated = np.tile(few, (copies, 1))
    shuffled = np.random.default_rng(1).permutation(repeated)
    assert frechet_distance(repeated, shuffled) == pytest.approx(0, abs=1e-5)
    assert precision_recall(repeated, shuffled) == (1, 1)


def test_precision_and_recall_of_points_on_a_line():
    reference = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])  # distances to the third neighbour: 3, 2, 2, 3, 9
    samples = np.array([[-3.1], [5.9], [6.5], [19.1], [20.0]])  # 9.6, 9, 9.6, 13.2, 14.1
    found = precision_recall(reference, samples, k=3)
    assert found == pytest.approx((2 / 5, 1))  # -3.1 is 3.1 from 0, 19.1 is 9.1 from 10, 20 is 10 from 10


def test_copies_of_one_real_image_have_the_recall_of_one_image():
    result = precision_recall(REFERENCE, np.repeat(REFERENCE[:1], 10, axis=0))
    assert result == pytest.approx((1, 1 / len(REFERENCE)))


def test_inception_score_of_certain_predictions_is_the_number_of_classes_per_split():
    sure = np.eye(6)
    assert inception_score(np.tile(sure, (3, 1))) == pytest.approx(6)
    assert inception_score(sure, split_size=2) == pytest.approx(2)
    assert inception_score(sure, split_size=4) == pytest.approx((4 + 2) / 2)  # the last split is shorter


@pytest.mark.parametrize(("a", "b"), [(REFERENCE, SAMPLES[:, :16]), (REFERENCE[:1], SAMPLES), (REFERENCE[0], SAMPLES)])
def test_mismatched_features_are_refused(a, b):
    with pytest.raises(SFDError):
        frechet_distance(a, b)


def spread(estimate, draw):
    """Standard deviation over draws, and the mean estimate of it by one draw's interval."""
    found = [estimate(draw(np.random.default_rng(seed))) for seed in range(300)]
    return np.std([one.value for one in found]), np.mean([(one.high - one.low) / 3.92 for one in found])


def test_intervals_match_the_spread_over_draws():
    mix = np.eye(8) + 0.3 * np.random.default_rng(0).normal(size=(8, 8))
    reference = Gaussian(np.zeros(8), np.eye(8), 0)
    expected, found = spread(lambda x: intervals.frechet(reference, x), lambda rng: rng.normal(size=(500, 8)) @ mix)
    assert found == pytest.approx(expected, rel=0.15)
    expected, found = spread(intervals.inception, lambda rng: rng.dirichlet(np.full(5, 0.4), size=400))
    assert found == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("classes", [5, 250])
def test_with_as_many_of_each_class_only_differences_within_one_count(classes):
    labels, mix = np.arange(500) % classes, np.linspace(1, 2, 8)
    centres, reference = 4 * np.random.default_rng(1000).normal(size=(classes, 8)), Gaussian(np.zeros(8), np.eye(8), 0)

    def draw(rng):
        return centres[labels] + mix * rng.normal(size=(500, 8))

    expected, found = spread(lambda x: intervals.frechet(reference, x, labels), draw)
    assert found == pytest.approx(expected, rel=0.15)
    assert spread(lambda x: intervals.frechet(reference, x), draw)[1] > 1.3 * expected


def test_single_images_of_classes_have_the_interval_of_a_plain_draw():
    reference, features = Gaussian(np.zeros(8), np.eye(8), 0), np.random.default_rng(0).normal(size=(50, 8))
    assert intervals.frechet(reference, features, np.arange(50)) == intervals.frechet(reference, features)


def test_the_interval_of_a_share_is_wide_for_few_images():
    few, many = (intervals.share(np.ones(count, bool)) for count in (4, 4000))
    assert few.value == many.value == few.high == many.high == 1
    assert few.low < 0.6 and 0.99 < many.low < 1
