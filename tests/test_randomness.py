"""Numbers are functions of their key: the one that runs, models and samples of the past were made with."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfd.utils import rng


@pytest.mark.parametrize("key", [(0,), (1, 0, 5), (2**32 - 1, 7), (2**32, 7), (3, 2**32 + 12, 4), (2**80 + 1,)])
def test_generators_are_numpys_for_the_list_of_the_key(key):
    seed, *rest = key
    entropy = [seed, zlib.crc32(b"noise"), *rest]
    expected = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).random(5)
    np.testing.assert_array_equal(rng.generator(seed, "noise", *rest).random(5), expected)


def test_negative_keys_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        rng.generator(0, "noise", -1)


@given(
    seed=st.integers(0, 2**70),
    key=st.lists(st.integers(0, 2**40), max_size=4),
    start=st.sampled_from([0, 5, 2**31, 2**32 - 9]),
)
def test_generators_are_those_that_numpy_seeds_one_by_one(seed, key, start):
    last = range(start, start + 9)
    for number, made in zip(last, rng.generators(seed, "purpose", *key, last=last), strict=True):
        alone = rng.generator(seed, "purpose", *key, number)
        drawn = [(g.random(2), g.integers(2**31, dtype=np.int32), g.standard_normal(5)) for g in (made, alone)]
        assert all(np.array_equal(a, b) for a, b in zip(*drawn, strict=True))
