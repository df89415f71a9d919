"""Random numbers are functions of their key and do not change between versions."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from sfd.utils import rng


@pytest.mark.parametrize("key", [(0,), (1, 0, 5), (2**32 - 1, 7), (2**32, 7), (3, 2**32 + 12, 4), (2**80 + 1,)])
def test_generators_equal_numpys_seed_sequence_of_the_key(key):
    seed, *rest = key
    entropy = [seed, zlib.crc32(b"noise"), *rest]
    expected = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).random(5)
    np.testing.assert_array_equal(rng.generator(seed, "noise", *rest).random(5), expected)


def test_negative_keys_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        rng.generator(0, "noise", -1)


def test_generators_of_samples_depend_on_key_and_index_alone():
    def drawn(samples, *key):
        found = rng.generators(7, "purpose", *key, samples=samples)
        return [np.concatenate([g.random(3), [g.integers(2**31, dtype=np.int32)], g.standard_normal(5)]) for g in found]

    whole = drawn(range(9), 3)
    np.testing.assert_array_equal(drawn(range(4, 9), 3), whole[4:])
    assert len({float(row[0]) for row in [*whole, *drawn(range(9), 4)]}) == 18
    normals = [g.standard_normal(4000) for g in rng.generators(0, "purpose", samples=range(12))]
    assert abs(np.corrcoef(normals) - np.eye(12)).max() < 0.08
