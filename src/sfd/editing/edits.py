"""Edits of samples and of real images, each a choice of noise and of paths for the streams.

Sources are packed, normalised latents (B, N): of a sample `model.sample(..., output="latent")`, of an image
`model.encode`. The *plan* is what they hold in all streams but texture. Results are latents too; `model.decode` shows
them. Without classes the null class is used, so that the plan alone says what is drawn. Arguments that a function does
not describe are those of `edit`: the model, classes, a schedule, a callback, and fields of `SamplingConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfd.editing.follow import Follow, follow
from sfd.generation.model import Classes, Model
from sfd.latents import TEXTURE, CompositeLatent
from sfd.sampling import Progress, initial_noise, integrate
from sfd.schedule import build_schedule
from sfd.solvers import SOLVERS
from sfd.utils.errors import SFDError

PLAN_GUIDANCE = 2.5  # where a plan is kept: see docs/editing.md for what it does
EVERYWHERE = torch.ones(1, 1)  # a brush


def edit(
    model: Model,
    noise: Tensor,
    paths: Mapping[str, Follow],
    classes: Classes | None = None,
    *,
    schedule: str | Mapping[str, Any] | None = None,
    plan_guidance: float = 1.0,
    guiding: Model | None = None,
    callback: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Tensor:
    """Sample with some streams on given paths: latents (B, N), on the CPU.

    Args:
        model: the generator.
        noise: (B, N), each stream's state at time 0; see `mixed_noise`.
        paths: by stream; see `Follow`.
        classes: names or numbers, one per image or one for all; None: the null class.
        schedule: name and options of another schedule than the model's own. A somewhat larger offset shows texture a
            clearer plan, at pairs of times that training did not show.
        plan_guidance: scale by which texture is guided by the plan; see `follow`.
        guiding: another model, to guide with; see `Model.sample`.
        callback: called after each solver step, batch by batch.
        settings: fields of `SamplingConfig` that differ from the model's own.
    """
    chosen = model.schedule if schedule is None else build_schedule(schedule, model.composite.names)
    if model.transformer.config.flow_map:
        raise SFDError(
            "a distilled model draws in steps that no path can join; edit with the model that it learnt from"
        )
    config = model.config(**settings)
    model.check_sampling(config, guiding)
    if SOLVERS[config.solver].stochastic:
        raise SFDError(f"{config.solver} adds noise, which leads off a given path; take another solver for edits")
    labels = model.labels_of(classes, len(noise))
    found = []
    for first in range(0, len(noise), config.batch_size):
        batch = slice(first, first + config.batch_size)
        x = noise[batch].to(model.device)
        velocity = model.velocity_field(torch.tensor(labels[batch], device=model.device), config, guiding)
        of_batch = {name: _of_batch(path, batch) for name, path in paths.items()}
        followed = follow(velocity, x, model.composite, of_batch, plan_guidance)
        result = integrate(followed, x, chosen, model.composite, **config.integration, callback=callback)
        found.append(result.x.cpu())
    return torch.cat(found)


def keep_plan(
    model: Model,
    latents: Tensor,
    seeds: Sequence[int],
    *,
    plan_seeds: Sequence[int] | None = None,
    where: Tensor | None = None,
    plan_guidance: float = PLAN_GUIDANCE,
    classes: Classes | None = None,
    **settings: Any,
) -> Tensor:
    """Keep each source's plan and redraw its texture.

    Args:
        latents: (B, N), the sources.
        seeds: of the texture's noise, one per image.
        plan_seeds: of the noise that the plans emerge from; None: `seeds`. Of a sample its own seed fits best.
        where: mask (H, W) or (B, H, W) of the part of the plan that is kept; None: all of it.
        plan_guidance: see `edit`.
    """
    streams = model.composite.unpack(latents)
    paths = {name: Follow(streams[name], where=where) for name in plan_streams(model.composite)}
    noise = mixed_noise(model.composite, seeds, plan_seeds)
    return edit(model, noise, paths, classes, plan_guidance=plan_guidance, **settings)


def change_plan(
    model: Model, seeds: Sequence[int], plan_seeds: Sequence[int], *, classes: Classes | None = None, **settings: Any
) -> Tensor:
    """Draw another plan for the same texture: the texture's noise is of `seeds`, the plan's of `plan_seeds`."""
    return edit(model, mixed_noise(model.composite, seeds, plan_seeds), {}, classes, **settings)


def swap_plans(
    model: Model, latents: Tensor, seeds: Sequence[int], *, classes: Classes | None = None, **settings: Any
) -> Tensor:
    """Give each of two samples the plan of the other and keep its own texture's noise.

    Args:
        latents: (2, N), the samples.
        seeds: two, that made them.
        classes: of the results, so of the plans: those of the samples in reverse.
    """
    if len(latents) != 2 or len(seeds) != 2:
        raise SFDError(f"two samples swap plans; got {len(latents)} with {len(seeds)} seeds")
    return keep_plan(model, latents.flip(0), seeds, plan_seeds=list(seeds)[::-1], classes=classes, **settings)


def paint(
    model: Model,
    latents: Tensor,
    brush: Tensor,
    seeds: Sequence[int],
    *,
    keep_texture: bool = True,
    plan_seeds: Sequence[int] | None = None,
    classes: Classes | None = None,
    **settings: Any,
) -> Tensor:
    """Redraw each source where the brush went, and keep the plan elsewhere.

    Args:
        latents: (B, N), the sources.
        brush: mask (H, W) or (B, H, W), 1 where to redraw.
        seeds: of the noise, one per image.
        keep_texture: keep the texture elsewhere too; False: all of it is drawn anew from the noise of `seeds`.
        plan_seeds: of the plan's noise; None: `seeds`.
    """
    kept, streams = 1 - brush.float(), model.composite.unpack(latents)
    names = model.composite.names if keep_texture else plan_streams(model.composite)
    paths = {name: Follow(streams[name], where=kept) for name in names}
    return edit(model, mixed_noise(model.composite, seeds, plan_seeds), paths, classes, **settings)


def sdedit(
    model: Model,
    latents: Tensor,
    start: float | Mapping[str, float],
    seeds: Sequence[int],
    *,
    plans: Tensor | None = None,
    classes: Classes | None = None,
    **settings: Any,
) -> Tensor:
    """Noise sources up to a time and denoise them again (SDEdit, Meng et al. 2021, arXiv 2108.01073), by streams.

    Args:
        latents: (B, N), the sources.
        start: a base time u: all streams start at their τ_k(u), so at one point of the schedule. Or a stream time by
            name, 0 for those left out: {"semantic": 1, "texture": 0.4} keeps the plan and starts texture at 0.4.
        seeds: of the noise, one per image.
        plans: (B, N), sources of the plans; None: `latents`.
    """
    composite = model.composite
    if isinstance(start, Mapping):
        times = dict(start)
    else:
        if not 0 <= start <= 1:
            raise SFDError(f"a base time to start from must be from 0 to 1, got {start}")
        at = model.schedule.at(torch.tensor(start, dtype=torch.float64)).time
        times = dict(zip(composite.names, at.tolist(), strict=True))
    streams = composite.unpack(latents)
    if plans is not None:
        others = composite.unpack(plans)
        streams |= {name: others[name] for name in plan_streams(composite)}
    paths = {name: Follow(streams.get(name, latents), time) for name, time in times.items()}
    return edit(model, mixed_noise(composite, seeds), paths, classes, **settings)


def interpolate_plans(
    model: Model,
    latents: Tensor,
    seed: int,
    *,
    count: int = 7,
    plan_seeds: Sequence[int] | None = None,
    classes: Classes | None = None,
    **settings: Any,
) -> Tensor:
    """Go from one plan to another in `count` images whose texture has the same noise; the ends are the two plans.

    Plans, and the noises that they emerge from, are interpolated on the sphere, which keeps their norms.

    Args:
        latents: (2, N), the sources of the plans.
        seed: of the texture's noise.
        count: images, the ends included.
        plan_seeds: two, of the plans' noises; None: `seed`.
    """
    if len(latents) != 2 or count < 2:
        raise SFDError(f"an interpolation needs 2 plans and 2 images or more, got {len(latents)} and {count}")
    noise = between(mixed_noise(model.composite, [seed, seed], plan_seeds), count, model.composite)
    targets = model.composite.unpack(between(latents, count, model.composite))
    paths = {name: Follow(targets[name]) for name in plan_streams(model.composite)}
    return edit(model, noise, paths, classes, **{"plan_guidance": PLAN_GUIDANCE} | settings)


def edit_by_name(
    model: Model,
    kind: str,
    latents: Tensor,
    seeds: Sequence[int],
    new_seeds: Sequence[int],
    *,
    start: float | Mapping[str, float] = 0.4,
    brush: Tensor = EVERYWHERE,
    keep_texture: bool = True,
    **settings: Any,
) -> Tensor:
    """Edit sources (1 or 2, N) made from `seeds`, by the kind's name: a result for each of `new_seeds`; two of a swap.

    SDEdit of two sources takes the plan of the first and the texture of the second.
    """
    count = len(new_seeds)
    own, (first, *second) = [seeds[0]] * count, latents[:, None].expand(-1, count, -1)
    texture, plans = (second[0], first) if second else (first, None)
    edits: dict[str, Callable[..., Tensor]] = {
        "keep-plan": partial(keep_plan, model, first, new_seeds, plan_seeds=own),
        "change-plan": partial(change_plan, model, own, new_seeds),
        "paint": partial(paint, model, first, brush, new_seeds, keep_texture=keep_texture),
        "sdedit": partial(sdedit, model, texture, start, new_seeds, plans=plans),
        "swap-plans": partial(swap_plans, model, latents, seeds),
        "interpolate": partial(interpolate_plans, model, latents, seeds[0], count=count, plan_seeds=seeds),
    }
    return edits[kind](**settings)


def between(ends: Tensor, count: int, composite: CompositeLatent) -> Tensor:
    """Interpolate from ends[0] to ends[1], (2, N), each stream on the sphere: (count, N)."""
    steps = torch.linspace(0, 1, count)
    return composite.pack({name: _on_sphere(part, steps) for name, part in composite.unpack(ends).items()})


def mixed_noise(composite: CompositeLatent, seeds: Sequence[int], plan_seeds: Sequence[int] | None = None) -> Tensor:
    """Draw noise (B, N): the texture's of the images with `seeds`, the other streams' of those with `plan_seeds`."""
    noise = composite.unpack(initial_noise(seeds, composite))
    if plan_seeds is not None:
        if len(plan_seeds) != len(seeds):
            raise SFDError(f"{len(plan_seeds)} plan_seeds were given for {len(seeds)} seeds; give as many")
        others = composite.unpack(initial_noise(plan_seeds, composite))
        noise = {name: noise[name] if name == TEXTURE else others[name] for name in composite.names}
    return composite.pack(noise)


def plan_streams(composite: CompositeLatent) -> list[str]:
    """Names of the streams that make the plan."""
    names = [name for name in composite.names if name != TEXTURE]
    if not names:
        raise SFDError("this model has texture alone, so it has no plan to keep or to change; use one with two streams")
    return names


def _of_batch(path: Follow, batch: slice) -> Follow:
    by_image = path.where is not None and path.where.dim() == 3 and len(path.where) > 1
    where = path.where[batch] if by_image and path.where is not None else path.where
    return path._replace(target=path.target[batch], where=where)


def _on_sphere(ends: Tensor, steps: Tensor) -> Tensor:
    """Spherical interpolation from ends[0] to ends[1], (2, …), at steps (n,) in [0, 1]: (n, …)."""
    a, b = ends.flatten(1)
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    s = steps[:, None]
    if angle < 1e-3:  # the ends all but agree
        mixed = torch.lerp(a[None], b[None], s)
    else:
        mixed = (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)
    return mixed.unflatten(1, ends.shape[1:])
