"""Guidance: one function of two velocity functions,

    v = v_w + g_k·(v_c − v_w),

with a scale g_k per stream, each within an interval of that stream's own time (Kynkäänniemi et al. 2024, arXiv
2404.07724). The guiding velocity v_w is that of the same network with the null class (classifier-free guidance, Ho &
Salimans 2022, arXiv 2207.12598) or of a smaller, less trained network with the same class (AutoGuidance, Karras et al.
2024, arXiv 2406.02507), or of a second head at an intermediate block of the same network, for no extra call (internal
guidance); nothing else differs. `generation.model.Model.velocity_field` chooses v_w.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from sfd.latents import CompositeLatent
from sfd.utils.errors import SFDError, unknown

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""v(x, t): x (B, N) packed; t (K,), the streams' times, on the CPU; returns (B, N)."""

VelocityPair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(v_c, v_w) in one call, each as a `VelocityField` gives it."""

Interval = tuple[float, float]
T = TypeVar("T")


def guide(
    cond: VelocityField,
    guiding: VelocityField | None,
    scale: float | Mapping[str, float],
    latent: CompositeLatent,
    interval: Interval | Mapping[str, Interval] | None = None,
    *,
    batched: VelocityPair | None = None,
) -> VelocityField:
    """Guide `cond` away from `guiding`.

    Args:
        cond: the conditional velocity v_c.
        guiding: the velocity to move away from, v_w; not needed if every scale is 1.
        scale: g ≥ 0 for all streams, or by stream name (1 for those left out). 0 gives v_w, 1 gives v_c.
        latent: the streams.
        interval: (low, high) of stream time in which a stream is guided, both ends included, for all streams or by
            name; a stream without one is guided throughout.
        batched: evaluates v_c and v_w in one call; used where both are needed, and then `guiding` may be None.

    Returns:
        a `GuidedVelocity`; or `cond` itself if every scale is 1.
    """
    scales = _by_stream(scale, 1.0, latent, "guidance scale")
    intervals = _by_stream((0.0, 1.0) if interval is None else interval, (0.0, 1.0), latent, "guidance interval")
    for name, g, (low, high) in zip(latent.names, scales, intervals, strict=True):
        if not (math.isfinite(g) and g >= 0):
            raise SFDError(f"the guidance scale of stream {name!r} must be finite and at least 0, got {g}; 1 is none")
        if not 0 <= low <= high <= 1:
            raise SFDError(f"the guidance interval of stream {name!r} needs 0 ≤ low ≤ high ≤ 1, got {low} to {high}")
    if all(g == 1 for g in scales):
        return cond
    if batched is None:
        if guiding is None:
            raise SFDError(
                f"guidance scale {scale} needs a guiding model; give one, or leave guidance at 1 "
                "(a model without classes cannot be guided by its null class)"
            )
        return GuidedVelocity(cond, lambda x, t: (cond(x, t), guiding(x, t)), scales, intervals, latent)
    return GuidedVelocity(cond, batched, scales, intervals, latent)


class PiecewiseVelocity(ABC):
    """A velocity field that jumps at known stream times; the sampler stops there."""

    independent = True  # a stream's velocity jumps at its own times alone, and not where another comes to rest

    @property
    @abstractmethod
    def discontinuities(self) -> list[tuple[float, ...]]:
        """Per stream: its times in (0, 1) at which the velocity jumps."""

    @abstractmethod
    def on_interval(self, active: Sequence[bool], midpoint: Sequence[float]) -> VelocityField:
        """Restrict to a smooth interval of base time, so that both its ends see the limit from inside.

        Args:
            active: per stream, whether it moves.
            midpoint: per stream, a time inside the interval, off any discontinuity.
        """

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate v; see `VelocityField`."""


class GuidedVelocity(PiecewiseVelocity):
    """A guided velocity, which evaluates v_w only where a moving stream is guided; made by `guide`."""

    def __init__(
        self,
        cond: VelocityField,
        both: VelocityPair,
        scales: Sequence[float],
        intervals: Sequence[Interval],
        latent: CompositeLatent,
    ) -> None:
        """Store what `guide` has checked; scales and intervals one per stream, in packed order."""
        self._cond, self._both = cond, both
        self._scales, self._intervals = scales, intervals
        self._sizes = latent.sizes

    @property
    def discontinuities(self) -> list[tuple[float, ...]]:
        """Per stream: the ends of the interval in which it is guided."""
        pairs = zip(self._scales, self._intervals, strict=True)
        return [tuple(t for t in (a, b) if g != 1 and a < b and 0 < t < 1) for g, (a, b) in pairs]

    def on_interval(self, active: Sequence[bool], midpoint: Sequence[float]) -> VelocityField:
        """Restrict to a smooth interval; a stream at rest needs no guidance."""
        each = zip(self._scales, self._intervals, active, midpoint, strict=True)
        scales = [g if moves and low < t < high else 1.0 for g, (low, high), moves, t in each]
        return self._cond if all(g == 1 for g in scales) else partial(self._guided, scales)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate v, guiding each stream whose time is in its interval; see `VelocityField`."""
        each = zip(self._scales, self._intervals, t.tolist(), strict=True)
        scales = [g if low <= time <= high else 1.0 for g, (low, high), time in each]
        return self._cond(x, t) if all(g == 1 for g in scales) else self._guided(scales, x, t)

    def _guided(self, scales: Sequence[float], x: Tensor, t: Tensor) -> Tensor:
        v_c, v_w = self._both(x, t)
        # In x's dtype: a network in bf16 may return its own, and would round the scales too.
        parts = zip(v_w.to(x.dtype).split(self._sizes, 1), v_c.to(x.dtype).split(self._sizes, 1), scales, strict=True)
        # lerp is exact at 0 and 1, so a stream that is not guided gets v_c to the last bit.
        return torch.cat([torch.lerp(from_w, from_c, g) for from_w, from_c, g in parts], dim=1)


def _by_stream(given: T | Mapping[str, T], default: T, latent: CompositeLatent, what: str) -> list[T]:
    """One value per stream, in packed order, from one for all or a mapping by name."""
    if not isinstance(given, Mapping):
        return [given] * len(latent.names)
    for name in given:
        if name not in latent.names:
            raise unknown(f"stream for a {what}", name, latent.names)
    return [given.get(name, default) for name in latent.names]
