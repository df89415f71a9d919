"""The transformer: velocities, guidance, losses, gradients and samples on given inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd import flow
from sfd.convert import transformer as published
from sfd.guidance import Scale, VelocityField, guide
from sfd.latents import CompositeLatent
from sfd.models.dit import LightningDiT
from sfd.sampling import integrate
from sfd.schedules import Schedule, build_schedule
from sfd.utils.errors import SFDError
from sfd.verification._case import Case, References

# What a case may hold without any quantity needing it.
INPUTS = {"x", "y", "t_texture", "t_semantic", "noise"}
INPUTS |= {"loss_x1", "loss_x0", "loss_base_time", "loss_features"}
# An adaptive solver is allowed its own error on top of rounding.
DOPRI5_FACTOR = 10.0
# Of `velocity_autoguided`, unless the case says otherwise.
AUTOGUIDANCE_SCALE = 1.5
_GUIDED = re.compile(r"velocity_(cfg|autoguided)(?:_sem(\d+(?:p\d+)?)_tex(\d+(?:p\d+)?))?")
_SAMPLE = re.compile(r"sample_(euler|dopri5)_shift(\d+(?:\.\d+)?)")


def claims(folder: Path, name: str, values: Mapping[str, Any]) -> bool:
    """Whether the values hold a transformer's configuration."""
    return isinstance(values.get("config"), dict) and "hidden_size" in values["config"]


def check(case: Case) -> None:
    """Check everything that the case has a reference for."""
    network = _network(case, "config", "weights")
    io = case.references()
    with torch.no_grad():
        _check_velocities(case, io, network)
        _check_samples(case, io, network)
    _check_losses(case, io, network)
    case.unchecked += [name for name in io.never_asked() if name not in INPUTS]


def _network(case: Case, field: str, weights: str) -> LightningDiT:
    if not isinstance(case.value(field), dict):
        raise SFDError(f"{case.name}.json: {field!r} should be a network's configuration")
    config = published.published_config(case.value(field))
    state = case.weights(weights)
    for name, table in published.tables(config).items():
        if name in state and state[name].shape == table.shape:
            case.compare(f"{name} of {weights}", table, state[name])
            state[name] = table
    state = published.from_published(state, config)
    network = LightningDiT(config)
    network.load_state_dict(state)
    return network.to(case.device).eval()


def _schedule(case: Case, network: LightningDiT) -> Schedule:
    names = network.config.composite.names
    delta = case.value("config")["semfirst_delta_t"]
    return build_schedule({"name": "offset", "delta": delta} if delta else {"name": "synchronous"}, names)


def _check_velocities(case: Case, io: References, network: LightningDiT) -> None:
    composite = network.config.composite
    shape = (composite["texture"].grid, composite["texture"].grid)
    x = io.shaped("x", None, sum(s.channels for s in composite.streams), *shape).flatten(1)
    labels = io.shaped("y", len(x))
    own = {"texture": io.shaped("t_texture", len(x))}
    own["semantic"] = io.shaped("t_semantic", len(x)) if "t_semantic" in io else own["texture"]  # one clock
    times = torch.stack([own[name] for name in composite.names], dim=1)
    case.compare_if_there("velocity", network(x, times, labels).velocity, io)
    guide_network = _network(case, "guide_config", "guide_weights") if "guide_config" in case.values else None
    # The null class of a network trained without label dropout was never trained; published ones do not even have it.
    has_null = case.value("config").get("class_dropout_prob") != 0
    weak: dict[str, tuple[LightningDiT | None, Tensor, str]] = {
        "cfg": (network if has_null else None, torch.full_like(labels, network.null_class), "cfg_scale"),
        "autoguided": (guide_network, labels, "autoguidance_scale"),
    }
    for kind, (weak_network, weak_labels, scale_field) in weak.items():
        present = [m for m in map(_GUIDED.fullmatch, io) if m and m[1] == kind]
        if weak_network is None:
            continue
        if not present:
            case.missing.append(f"velocity_{kind}")
        for match in present:
            scale = _scale(match, composite.names) if match[2] else _given_scale(case, scale_field)
            # Samples have times of their own here; a velocity function has one for its batch.
            guided = [
                guide(_field(network, labels[i, None]), _field(weak_network, weak_labels[i, None]), scale, composite)(
                    x[i, None], times[i].cpu()
                )
                for i in range(len(x))
            ]
            case.compare(match[0], torch.cat(guided), io[match[0]])


def _given_scale(case: Case, field: str) -> float:
    defaulted = field == "autoguidance_scale" and field not in case.values
    return AUTOGUIDANCE_SCALE if defaulted else case.number(field)


def _scale(match: re.Match[str], streams: tuple[str, ...]) -> Scale:
    """Read sem1p9_tex1p3; a network without a semantic stream has no use for its scale."""
    scales = {"semantic": float(match[2].replace("p", ".")), "texture": float(match[3].replace("p", "."))}
    return {name: scales[name] for name in streams}


def _field(network: LightningDiT, labels: Tensor) -> VelocityField:
    def velocity(x: Tensor, times: Tensor) -> Tensor:
        return network(x, times.to(x.device).expand(len(x), -1), labels).velocity

    return velocity


def _check_losses(case: Case, io: References, network: LightningDiT) -> None:
    if "loss_x1" not in io:
        case.missing.append("losses and gradients")
        return
    composite = network.config.composite
    grid = composite["texture"].grid
    shape = (None, sum(s.channels for s in composite.streams), grid, grid)
    x1, x0 = io.shaped("loss_x1", *shape).flatten(1), io.shaped("loss_x0", *shape).flatten(1)
    times = _schedule(case, network).at(io.shaped("loss_base_time", len(x1))).time
    noised = flow.interpolate(x1, x0, composite.per_entry(times))
    repa = network.projector is not None
    output = network(noised, times, io.shaped("y", len(x1)), project=repa)
    target = flow.velocity_target(x1, x0)
    weights = composite.per_entry(torch.tensor([s.weight for s in composite.streams], device=case.device))
    losses = {
        "loss_velocity": flow.velocity_loss(output.velocity, target, weights),
        "loss_cosine": flow.cosine_loss(composite.per_position(output.velocity), composite.per_position(target)),
    }
    if repa:
        tokens = composite.token_grid
        features = io.shaped("loss_features", len(x1), network.config.repa_channels, tokens, tokens)
        losses["loss_repa"] = flow.repa_loss(output.projection, features)
    for name, value in losses.items():
        case.compare_if_there(name, value, io)
    total = torch.stack([value.mean() for value in losses.values()]).sum()
    case.compare_if_there("loss_total", total, io)
    total.backward()
    _check_gradients(case, io, network)


def _check_gradients(case: Case, io: References, network: LightningDiT) -> None:
    ours = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in network.named_parameters()
    }
    gradients = published.to_published(ours, network.config)  # they lie where their weights lie
    wanted = [name for name in io if name.startswith("grad.")]
    if not wanted:
        case.missing.append("gradients")
    for name in wanted:
        key = name.removeprefix("grad.")
        if key in gradients and key not in published.TABLES:
            gradient = gradients[key]
            if key == published.LABELS:
                gradient = gradient[: len(io[name])]  # without label dropout there is no row for the null class
            case.compare(name, gradient, io[name])


def _check_samples(case: Case, io: References, network: LightningDiT) -> None:
    present = [m for m in map(_SAMPLE.fullmatch, io) if m]
    if not present:
        if "sampler" in case.values:
            case.missing.append("samples")
        return
    composite = network.config.composite
    noise = io.shaped("noise", None, sum(s.channels for s in composite.streams), *composite["texture"].shape[1:])
    velocity = _field(network, io.shaped("y", len(noise)))
    start, delta = noise.flatten(1), case.value("config")["semfirst_delta_t"]
    for match in present:
        solver, settings = match[1], _sampler(case, match[1])
        if solver == "euler":
            x = _euler(velocity, start, delta, composite, settings, float(match[2]))
        else:  # a shift moves steps, so it does not matter to a solver that chooses its own
            x = integrate(velocity, start, _schedule(case, network), composite, solver=solver, options=settings).x
        case.compare(match[0], x, io[match[0]], DOPRI5_FACTOR if solver == "dopri5" else 1.0)


def _sampler(case: Case, solver: str) -> Any:
    settings = case.value("sampler")
    needed = {"euler": "euler_time_points", "dopri5": "dopri5"}[solver]
    if not isinstance(settings, dict) or needed not in settings:
        raise SFDError(f"{case.name}.json: 'sampler' should say {needed!r}, to compare samples with")
    return settings[needed]


def _euler(
    velocity: VelocityField, x: Tensor, delta: float, composite: CompositeLatent, points: int, shift: float
) -> Tensor:
    """Sample as the published Euler does: blind to knots, each stream at rest or not by the time of the step's start.

    Its clock t = (1 + Δ)·u is float32, semantics move where t ≤ 1 and texture where t ≥ Δ. So both move in a step that
    starts on a knot, and whether it does is a matter of rounding: `sfd.sampling.integrate` has the rates after a knot.
    """
    t = torch.linspace(0, 1 + delta, points)
    if shift:
        u = t / (1 + delta)
        t = shift * u / (1 + (shift - 1) * u) * (1 + delta)
    for now, following in pairwise(t):
        times = {"texture": (now - delta).clamp(min=0), "semantic": now.clamp(max=1)}
        moves = {"texture": now >= delta, "semantic": now <= 1}
        rates = composite.per_entry(torch.stack([moves[name] for name in composite.names]).float())
        v = velocity(x, torch.stack([times[name] for name in composite.names]))
        x = x + (following - now).to(x.device) * rates.to(x.device) * v
    return x
