"""Random numbers as functions of their key, never of earlier draws.

Every draw names its key: (seed, purpose, step, sample) or the like. So a run can stop anywhere and resume, a batch can
be split over any number of ranks, and image k looks the same in any batch. The generator is the counter-based
Philox (Salmon et al. 2011), drawn on the CPU so that every device gets the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def _key(seed: int, purpose: str, *key: int) -> np.random.SeedSequence:
    entropy = [seed, zlib.crc32(purpose.encode()), *key]
    # Numbers of 32 bits are the words that a list of them is turned into, which takes longer than all the rest.
    words = np.array(entropy, np.uint32) if min(entropy) >= 0 and max(entropy) < 1 << 32 else entropy
    return np.random.SeedSequence(words)


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Make the generator of one purpose ("noise", "order", …) at one place in the run.

    Args:
        seed: the run's or the image's seed, ≥ 0.
        purpose: keeps streams with equal keys apart.
        key: further coordinates, each ≥ 0, such as the step and the sample's number.
    """
    return np.random.Generator(np.random.Philox(_key(seed, purpose, *key)))


def generators(seed: int, purpose: str, *key: int, samples: range) -> Iterator[np.random.Generator]:
    """Make one generator per sample: sample k draws from counter k·2¹²⁸ on, so none overlaps with another.

    Philox is counter-based: all share the key, which takes long to derive. One generator is reused: each is valid only
    until the next is requested.
    """
    philox = np.random.Philox(_key(seed, purpose, *key))
    shared = np.random.Generator(philox)
    state = philox.state
    for sample in samples:
        state["state"]["counter"] = np.array([0, 0, sample, 0], np.uint64)
        philox.state = state
        yield shared


def normal(seeds: Sequence[int], size: int, purpose: str, *key: int) -> Tensor:
    """Draw standard normals, row i from seeds[i] alone: (len(seeds), size), float32, on the CPU."""
    rows = [generator(seed, purpose, *key).standard_normal(size, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, size)


@contextmanager
def seeded(seed: int, purpose: str, *key: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block, for initialisers that use no other.

    Those of GPUs are left alone: asking for their states would start all of a machine's GPUs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator(seed, purpose, *key).integers(2**63)))
        yield
