"""Guidance: one function of two velocity functions,

    v = v_w + g_k·(v_c − v_w),

with a scale g_k per stream, each within an interval of that stream's own time (Kynkäänniemi et al. 2024). The weak
model is the same network with the null class (classifier-free guidance, Ho & Salimans 2022) or a smaller, less trained
network with the same class (AutoGuidance, Karras et al. 2024); nothing else differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sfd.errors import SFDError, unknown
from sfd.streams import Composite

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""v(x, times): x (B, N) packed, times (K,) on the CPU, one a stream and the same for the batch; returns (B, N)."""

Scale = float | Mapping[str, float]
Interval = tuple[float, float]


def guide(
    strong: VelocityField,
    weak: VelocityField | None,
    scale: Scale,
    composite: Composite,
    interval: Interval | Mapping[str, Interval] | None = None,
) -> VelocityField:
    """Guide `strong` away from `weak`.

    Args:
        strong: the velocity that is wanted, v_c.
        weak: the velocity to move away from, v_w; None will do if every scale is 1.
        scale: g for all streams, or by stream name (1 for those left out); ≥ 0. 0 gives v_w, 1 gives v_c.
        composite: the streams.
        interval: (low, high) of stream time within which a stream is guided, both ends included, for all streams or by
            name; a stream that has none is guided throughout.

    Returns:
        the guided velocity. It is `strong` itself if every scale is 1, and calls `weak` only at times when some stream
        with another scale is inside its interval.

    Raises:
        SFDError: an unknown stream, a negative or infinite scale, an interval outside [0, 1], or no weak model.
    """
    scales = _scales(scale, composite)
    intervals = _intervals(interval, composite)
    if all(g == 1 for g in scales):
        return strong
    if weak is None:
        raise SFDError(f"a guidance scale other than 1 needs a weak model, but there is none for scale {scale}")
    weak_field = weak

    def guided(x: Tensor, times: Tensor) -> Tensor:
        now = [
            g if low <= t <= high else 1.0 for g, (low, high), t in zip(scales, intervals, times.tolist(), strict=True)
        ]
        wanted = strong(x, times)
        if all(g == 1 for g in now):
            return wanted
        # lerp is exact at weights 0 and 1, so a stream that is not guided gets v_c to the last bit.
        # In x's dtype, because a network in bf16 may return its own and would round the scales too.
        weights = composite.expand(x.new_tensor(now))
        return torch.lerp(weak_field(x, times).to(x.dtype), wanted.to(x.dtype), weights)

    return guided


def _scales(scale: Scale, composite: Composite) -> list[float]:
    """One scale a stream, in packed order."""
    named = scale if isinstance(scale, Mapping) else dict.fromkeys(composite.names, scale)
    _check_names(named, composite, "guidance scale")
    for name, g in named.items():
        if not (math.isfinite(g) and g >= 0):
            raise SFDError(
                f"the guidance scale of stream {name!r} must be finite and at least 0, got {g}; 1 is no guidance"
            )
    return [float(named.get(name, 1.0)) for name in composite.names]


def _intervals(interval: Interval | Mapping[str, Interval] | None, composite: Composite) -> list[Interval]:
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


def _check_names(named: Mapping[str, object], composite: Composite, what: str) -> None:
    for name in named:
        if name not in composite.names:
            raise unknown(f"stream for a {what}", name, composite.names)
