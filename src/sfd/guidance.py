"""Guidance: one function of two velocity functions,

    v = v_w + g_k·(v_c − v_w),

with a scale g_k per stream, each within an interval of that stream's own time (Kynkäänniemi et al. 2024). The weak
model is the same network with the null class (classifier-free guidance, Ho & Salimans 2022) or a smaller, less trained
network with the same class (AutoGuidance, Karras et al. 2024); nothing else differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sfd.latents import CompositeLatent
from sfd.utils.errors import SFDError, unknown
from sfd.utils.transfer import sent

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""v(x, times): x (B, N) packed, times (K,) on the CPU, one a stream and the same for the batch; returns (B, N)."""

Scale = float | Mapping[str, float]
Interval = tuple[float, float]


Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Both velocities in one call, (v_c, v_w), each as a `VelocityField` gives it."""

Between = Literal["hold", "extrapolate"]


class Guided:
    """A guided velocity, which asks for the weak one only where it counts; made by `guide`.

    It counts where a stream moves, with a scale other than 1, inside its interval. Which streams do is fixed by the
    piece that was begun, or decided by the times of each call. The difference v_c − v_w may also be reused: evaluated
    every so many calls, and in between held, or extrapolated along a line through the last two.
    """

    def __init__(
        self,
        strong: VelocityField,
        weak: VelocityField,
        scales: Sequence[float],
        intervals: Sequence[Interval],
        composite: CompositeLatent,
        weak_every: int,
        weak_between: Between,
        pair: Pair | None,
    ) -> None:
        """Keep what `guide` has checked; scales and intervals one a stream, in packed order."""
        self._strong, self._weak, self._pair = strong, weak, pair
        self._scales = torch.tensor(scales, dtype=torch.float64)
        self._low, self._high = torch.tensor(intervals, dtype=torch.float64).unbind(dim=1)
        self._composite = composite
        self._every, self._between = weak_every, weak_between
        self._fixed: Tensor | None = None  # scales of the piece
        self.weak_evaluations = 0
        self.begin([True] * len(scales))

    @property
    def jumps(self) -> list[tuple[float, ...]]:
        """Ends of the intervals, for each stream that they matter to; see `PiecewiseVelocity`."""
        ends = zip(self._scales.tolist(), self._low.tolist(), self._high.tolist(), strict=True)
        return [tuple(t for t in (a, b) if g != 1 and a < b and 0 < t < 1) for g, a, b in ends]

    def begin(self, moving: Sequence[bool], middle: Sequence[float] | None = None) -> None:
        """Enter a piece, see `PiecewiseVelocity`; no weak velocity is carried over from the one before.

        Without `middle` the times of each call are compared with the intervals, as before the first `begin`.
        """
        self._moving, self._fixed = torch.tensor(moving), None
        if middle is not None:
            halfway = torch.tensor(middle, dtype=torch.float64)
            # Off both ends, so an interval of a single time guides nothing.
            inside = (self._low < halfway) & (halfway < self._high) & self._moving
            self._fixed = torch.where(inside, self._scales, 1.0)  # (K,)
        self._forget()

    def _forget(self) -> None:
        self._known: list[tuple[float, Tensor]] = []  # (sum of stream times, v_c − v_w), the last two
        self._since = 0  # calls since the last of them

    def __call__(self, x: Tensor, times: Tensor) -> Tensor:
        """Evaluate v; see `VelocityField`. Times may also be (B, K), each image's own."""
        now = self._fixed
        if now is None:
            inside = (self._low <= times) & (times <= self._high) & self._moving
            now = torch.where(inside, self._scales, 1.0)  # (…, K)
        if bool((now == 1).all()):
            self._forget()
            return self._strong(x, times)
        weights = self._composite.per_entry(sent(now.to(x.dtype), x.device))
        if self._known and self._since < self._every - 1:
            self._since += 1
            wanted = self._strong(x, times).to(x.dtype)
            return wanted + (weights - 1) * self._difference(times)
        wanted, weak = self._pair(x, times) if self._pair else (self._strong(x, times), self._weak(x, times))
        self.weak_evaluations += 1
        # In x's dtype, because a network in bf16 may return its own and would round the scales too.
        wanted, weak = wanted.to(x.dtype), weak.to(x.dtype)
        if self._every > 1:
            self._known = [*self._known, (float(times.sum()), wanted - weak)][-2:]
            self._since = 0
        # lerp is exact at weights 0 and 1, so a stream that is not guided gets v_c to the last bit.
        return torch.lerp(weak, wanted, weights)

    def _difference(self, times: Tensor) -> Tensor:
        """Estimate v_c − v_w from the last two."""
        at, last = self._known[-1]
        before, first = self._known[0]
        if self._between == "hold" or at == before:
            return last
        return last + (float(times.sum()) - at) / (at - before) * (last - first)


def guide(
    strong: VelocityField,
    weak: VelocityField | None,
    scale: Scale,
    composite: CompositeLatent,
    interval: Interval | Mapping[str, Interval] | None = None,
    *,
    weak_every: int = 1,
    weak_between: Between = "hold",
    pair: Pair | None = None,
) -> VelocityField:
    """Guide `strong` away from `weak`.

    Args:
        strong: the velocity that is wanted, v_c.
        weak: the velocity to move away from, v_w; None will do if every scale is 1.
        scale: g for all streams, or by stream name (1 for those left out); ≥ 0. 0 gives v_w, 1 gives v_c.
        composite: the streams.
        interval: (low, high) of stream time within which a stream is guided, both ends included, for all streams or by
            name; a stream that has none is guided throughout.
        weak_every: evaluate v_w at one in so many calls, and reuse v_c − v_w in between.
        weak_between: hold the last v_c − v_w, or extrapolate from the last two.
        pair: evaluates both in one call; used in place of `strong` and `weak` where both are needed.

    Returns:
        the guided velocity, a `Guided`; or `strong` itself if every scale is 1.

    Raises:
        SFDError: an unknown stream, a negative or infinite scale, an interval outside [0, 1], or no weak model.
    """
    scales = _scales(scale, composite)
    intervals = _intervals(interval, composite)
    if weak_every < 1:
        raise SFDError(f"the weak model must be evaluated every 1 or more calls, got {weak_every}")
    if all(g == 1 for g in scales):
        return strong
    if weak is None:
        raise SFDError(f"a guidance scale other than 1 needs a weak model, but there is none for scale {scale}")
    return Guided(strong, weak, scales, intervals, composite, weak_every, weak_between, pair)


def _scales(scale: Scale, composite: CompositeLatent) -> list[float]:
    """One scale a stream, in packed order."""
    named = scale if isinstance(scale, Mapping) else dict.fromkeys(composite.names, scale)
    _check_names(named, composite, "guidance scale")
    for name, g in named.items():
        if not (math.isfinite(g) and g >= 0):
            raise SFDError(
                f"the guidance scale of stream {name!r} must be finite and at least 0, got {g}; 1 is no guidance"
            )
    return [float(named.get(name, 1.0)) for name in composite.names]


def _intervals(interval: Interval | Mapping[str, Interval] | None, composite: CompositeLatent) -> list[Interval]:
    """One interval a stream, in packed order."""
    always = (0.0, 1.0)
    if interval is None:
        return [always] * len(composite.names)
    named = interval if isinstance(interval, Mapping) else dict.fromkeys(composite.names, interval)
    _check_names(named, composite, "guidance interval")
    for name, (low, high) in named.items():
        if not 0 <= low <= high <= 1:
            raise SFDError(f"the guidance interval of stream {name!r} needs 0 ≤ low ≤ high ≤ 1, got {low} to {high}")
    return [named.get(name, always) for name in composite.names]


def _check_names(named: Mapping[str, object], composite: CompositeLatent, what: str) -> None:
    for name in named:
        if name not in composite.names:
            raise unknown(f"stream for a {what}", name, composite.names)
