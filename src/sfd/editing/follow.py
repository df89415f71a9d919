"""Streams that follow a given path while the others are integrated.

A clean plan beside texture that is still noise is a pair of times that the network never saw in training. On the
schedule's curve, a stream k with noise x0 that is to arrive at x1 must be x_k = (1 − τ_k)·x0 + τ_k·x1, so its velocity
is v_k = x1 − x0, a constant. That velocity in place of the network's, for the whole stream, for a part of space, or
until some time of the stream, is all that editing needs.

Texture may be guided by the plan as it is by a class: away from what the network predicts where the plan is no clearer
than texture. The state at an earlier time of stream k is x_k − (t − t')·v_k, on the same line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sfd.guidance import PiecewiseVelocity, VelocityField
from sfd.latents import TEXTURE, CompositeLatent, Stream
from sfd.utils.errors import SFDError, unknown

COVERED = 0.5  # share of a latent's position that a mask must cover to count there


class Follow(NamedTuple):
    """The path of a stream: (1 − t)·x0 + t·target, until its time is `until`; from then on the network moves it."""

    target: Tensor  # (B, channels, grid, grid), clean and normalised
    until: float = 1.0  # stream time in [0, 1]
    where: Tensor | None = None  # (H, W) or (B, H, W) at any resolution, 1 where it follows; None: everywhere


def follow(
    velocity: VelocityField,
    noise: Tensor,
    latent: CompositeLatent,
    paths: Mapping[str, Follow],
    plan_guidance: float = 1.0,
) -> VelocityField:
    """Let streams follow paths, the others `velocity`.

    Args:
        velocity: v(x, t), guided or not.
        noise: (B, N), the state at base time 0; integration must start there.
        latent: the streams.
        paths: by stream.
        plan_guidance: scale g ≥ 0 by which texture is guided by the other streams; 1 is none.
    """
    if not 0 <= plan_guidance < math.inf:
        raise SFDError(f"plan_guidance must be finite and at least 0, got {plan_guidance}; 1 is none")
    for name, path in paths.items():
        if name not in latent.names:
            raise unknown("stream", name, latent.names)
        if tuple(path.target.shape) != (len(noise), *latent[name].shape):
            shapes = (len(noise), *latent[name].shape), tuple(path.target.shape)
            raise SFDError(f"stream {name!r} must follow latents of shape {shapes[0]}, got {shapes[1]}")
        if path.where is not None and path.where.dim() == 3 and len(path.where) not in (1, len(noise)):
            raise SFDError(
                f"{len(path.where)} masks were given for {len(noise)} images; give one per image, or one for all"
            )
        if not 0 <= path.until <= 1:
            raise SFDError(f"stream {name!r} can follow until a time from 0 to 1, got {path.until}")
    paths = {name: path for name, path in paths.items() if path.until > 0}
    return FollowingVelocity(velocity, noise, latent, paths, plan_guidance) if paths else velocity


class FollowingVelocity(PiecewiseVelocity):
    """A velocity with some streams, or parts of them, on straight paths; made by `follow`."""

    def __init__(
        self,
        velocity: VelocityField,
        noise: Tensor,
        latent: CompositeLatent,
        paths: Mapping[str, Follow],
        plan_guidance: float,
    ) -> None:
        """Store what `follow` has checked."""
        self._velocity, self._sizes, self._latent = velocity, latent.sizes, latent
        self._texture = latent.names.index(TEXTURE)
        scales = [plan_guidance if name == TEXTURE else 1.0 for name in latent.names]
        # With plan guidance texture's velocity contains that of the semantics.
        self.independent = plan_guidance == 1
        self._guided, self._guidance = plan_guidance != 1, latent.per_entry(torch.tensor(scales)).to(noise)
        self._paths = [paths.get(name) for name in latent.names]
        starts = noise.split(latent.sizes, dim=1)
        self._straight = [
            None if path is None else path.target.flatten(1).to(x0) - x0
            for path, x0 in zip(self._paths, starts, strict=True)
        ]
        self._where = [
            None if path is None or path.where is None else entries(path.where, stream).to(noise.device)
            for path, stream in zip(self._paths, latent.streams, strict=True)
        ]

    @property
    def discontinuities(self) -> list[tuple[float, ...]]:
        """Those of the velocity, and the times at which streams stop following."""
        inner = self._velocity.discontinuities if isinstance(self._velocity, PiecewiseVelocity) else ()
        ends = [() if path is None or path.until == 1 else (path.until,) for path in self._paths]
        return [(*jumps, *end) for jumps, end in zip(inner or [()] * len(ends), ends, strict=True)]

    def on_interval(self, active: Sequence[bool], midpoint: Sequence[float]) -> VelocityField:
        """Restrict to a smooth interval; the network is not evaluated where nothing needs it."""
        following = self._following(midpoint)
        whole = [follows and where is None for follows, where in zip(following, self._where, strict=True)]
        needed = [moves and not given for moves, given in zip(active, whole, strict=True)]
        guided = self._guided and needed[self._texture]
        inner = self._velocity
        if isinstance(inner, PiecewiseVelocity):
            inner = inner.on_interval(needed, midpoint)

        def restricted(x: Tensor, t: Tensor) -> Tensor:
            if not any(needed):
                return self._mixed(following, torch.zeros_like(x))
            return self._followed(inner, following, guided, x, t)

        return restricted

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate v; see `VelocityField`."""
        return self._followed(self._velocity, self._following(t.tolist()), self._guided, x, t)

    def _followed(
        self, velocity: VelocityField, following: Sequence[bool], guided: bool, x: Tensor, t: Tensor
    ) -> Tensor:
        v = velocity(x, t)
        if guided:
            earlier = t.clamp(max=t[self._texture].item())
            back = self._latent.per_entry((t - earlier).to(x)) * self._mixed(following, v)
            v = torch.lerp(velocity(x - back, earlier), v, self._guidance)
        return self._mixed(following, v)

    def _following(self, times: Sequence[float]) -> list[bool]:
        pairs = zip(self._paths, times, strict=True)
        return [path is not None and (path.until == 1 or t < path.until) for path, t in pairs]

    def _mixed(self, following: Sequence[bool], v: Tensor) -> Tensor:
        parts = []
        for part, follows, straight, where in zip(
            v.split(self._sizes, dim=1), following, self._straight, self._where, strict=True
        ):
            if not follows or straight is None:
                parts.append(part)
            else:
                parts.append(straight if where is None else torch.where(where, straight, part))
        return torch.cat(parts, dim=1)


def entries(where: Tensor, stream: Stream) -> Tensor:
    """Mark a stream's entries (1 or B, n) that a mask (H, W) or (B, H, W) covers by half or more."""
    mask = where if where.dim() == 3 else where[None]
    if mask.dim() != 3:
        raise SFDError(f"a mask must have shape (H, W) or (images, H, W), got {tuple(where.shape)}")
    covered = F.adaptive_avg_pool2d(mask[:, None].float(), stream.grid) >= COVERED
    return covered.expand(-1, *stream.shape).flatten(1)
