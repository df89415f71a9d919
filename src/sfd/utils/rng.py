"""Random numbers as functions of what they are for, never of what was drawn before.

Every draw names its key: (seed, purpose, step, sample) or the like. So a run can stop anywhere and go on, a batch can
be split over any number of processes, and image k looks the same in any batch. The generator is the counter-based
Philox (Salmon et al. 2011), drawn on the CPU so that every device gets the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

POOL = 4  # words that a `SeedSequence` gathers entropy in


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Make the generator of one purpose ("noise", "order", …) at one place in the run.

    Args:
        seed: the run's or the image's seed, ≥ 0.
        purpose: keeps streams with equal keys apart.
        key: further coordinates, each ≥ 0, such as the step and the sample's number.
    """
    entropy = [seed, zlib.crc32(purpose.encode()), *key]
    # Numbers of 32 bits are the words that a list of them is turned into, which takes longer than all the rest.
    words = np.array(entropy, np.uint32) if min(entropy) >= 0 and max(entropy) < 1 << 32 else entropy
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def generators(seed: int, purpose: str, *key: int, last: range) -> Iterator[np.random.Generator]:
    """Give `generator(seed, purpose, *key, k)` for each k of `last`, at a sixth of the time.

    It is one generator that is set anew, so each is good until the next is asked for.

    Args:
        seed, purpose, key: as of `generator`.
        last: the last coordinate; each at least 0 and less than 2³².
    """
    words = [word for number in (seed, zlib.crc32(purpose.encode()), *key) for word in _words(number)]
    philox = np.random.Philox(0)
    made = np.random.Generator(philox)
    start = philox.state
    for philox_key in _philox_keys(words, np.asarray(last, np.uint32)):
        start["state"]["key"] = philox_key
        philox.state = start
        yield made


def _words(number: int) -> list[int]:
    """Divide a number into words of 32 bits, the lowest first, as numpy's `SeedSequence` does."""
    return [number >> shift & 0xFFFFFFFF for shift in range(0, max(number.bit_length(), 1), 32)]


def _philox_keys(words: Sequence[int], last: np.ndarray) -> np.ndarray:
    """Compute `SeedSequence([*words, k]).generate_state(2, uint64)` for each k of `last` (B,), all at once: (B, 2).

    The hash is O'Neill's `seed_seq_fe` (2015) with numpy's constants, which a test compares with numpy itself.
    """
    entropy = [*(np.full(len(last), word, np.uint32) for word in words), last]
    entropy += [np.zeros(len(last), np.uint32)] * (POOL - len(entropy))
    hashed = _Hash(0x43B0D7E5, 0x931E8875)
    pool = [hashed(word) for word in entropy[:POOL]]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                pool[target] = _mixed(pool[target], hashed(pool[source]))
    for word in entropy[POOL:]:
        pool = [_mixed(each, hashed(word)) for each in pool]
    drawn = _Hash(0x8B51F9DD, 0x58F38DED)
    return np.stack([drawn(each) for each in pool], axis=1).astype("<u4").view("<u8")


class _Hash:
    """A hash of 32 bits whose constant moves on with each use."""

    def __init__(self, constant: int, factor: int) -> None:
        self._constant, self._factor = constant, factor

    def __call__(self, values: np.ndarray) -> np.ndarray:
        values = values ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor & 0xFFFFFFFF
        values = values * np.uint32(self._constant)
        return values ^ (values >> np.uint32(16))


def _mixed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    mixed = np.uint32(0xCA01F9DD) * a - np.uint32(0x4973F715) * b
    return mixed ^ (mixed >> np.uint32(16))


def normal(seeds: Sequence[int], size: int, purpose: str, *key: int) -> Tensor:
    """Draw standard normals, row i from seeds[i] alone. Returns (len(seeds), size), float32, on the CPU."""
    rows = [generator(seed, purpose, *key).standard_normal(size, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, size)


@contextmanager
def seeded(seed: int, purpose: str, *key: int) -> Iterator[None]:
    """Give torch's global CPU generator a state of its own inside the block, for initialisers that know no other.

    Those of GPUs are left alone: asking for their states would start all of a machine's GPUs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator(seed, purpose, *key).integers(2**63)))
        yield
