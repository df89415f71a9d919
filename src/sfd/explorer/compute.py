"""What the page can ask for, and the answer: samples and edits as panels of frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from sfd.editing import edit, mixed_noise
from sfd.editing.edits import between, edit_by_name
from sfd.explorer.frames import COLUMNS, MAX_PIXELS, MAX_SIDE, Run, Superseded, image_side, panels, plan_stream
from sfd.generation.config import SamplingConfig
from sfd.generation.curves import schedule_curves
from sfd.generation.model import Model
from sfd.latents import TEXTURE
from sfd.sampling import initial_noise
from sfd.schedule import Schedule, build_schedule
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

__all__ = ["Request", "Superseded", "compute", "facts"]

MAX_SEED = (1 << 32) - 1 - 8  # the seeds of several results follow one another
MAX_STEPS, MAX_COUNT, MAX_DELTA, MAX_SCALE = 100, 6, 1.5, 10.0
MAX_BRUSH_GRID = 64
SEEN = 0.01  # distance between pairs of times below which a schedule is the one that training showed
Solver = Literal["euler", "heun", "multistep", "dopri5"]
SOLVERS = get_args(Solver)  # those that follow a given path
Mode = Literal["sample", "keep-plan", "change-plan", "swap-plans", "interpolate", "sdedit", "paint"]
OF_TWO = ("swap-plans", "interpolate", "sdedit")  # edits of two samples


class Request(Settings):
    """One drawing."""

    mode: Mode = "sample"
    label: int | None = Field(None, ge=0, description="class of the first sample; null: the null class")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the first sample")
    other_label: int | None = Field(None, ge=0, description="class of the results, or of the second sample")
    other_seed: int = Field(1, ge=0, le=MAX_SEED, description="of the first result, or of the second sample")
    count: int = Field(2, ge=1, le=MAX_COUNT, description="results of an edit")
    solver: Solver = "multistep"
    steps: int = Field(25, ge=1, le=MAX_STEPS)
    guidance: dict[str, Annotated[float, Field(ge=0, le=MAX_SCALE)]] = Field({}, description="scale by stream")
    delta: float | None = Field(None, ge=0, le=MAX_DELTA, description="another offset than the model's own")
    start: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="sdedit: time until which a stream follows its source; 0 where it is left out"
    )
    keep_texture: bool = Field(True, description="paint: keep the texture too where the brush did not go")
    brush: tuple[Annotated[int, Field(ge=0, le=1)], ...] = Field((), max_length=MAX_BRUSH_GRID**2)


def check_model(model: Model) -> None:
    """Refuse models that have no trajectory of two streams to explore."""
    if len(model.composite.streams) < 2:
        raise SFDError("this model has a single stream, so there is nothing to compare; explore one with two")
    if model.transformer.config.flow_map:
        raise SFDError("this model was distilled and has no velocity at each time; explore its teacher instead")


def facts(
    model: Model, name: str, *, guiding: Model | None = None, side: int = MAX_SIDE, **settings: Any
) -> dict[str, Any]:
    """What the page has to know of a model; see `compute` for the arguments."""
    check_model(model)
    config = model.config(**settings)
    solver = config.solver if config.solver in SOLVERS else "multistep"
    scale = config.guidance
    scales = scale if isinstance(scale, dict) else dict.fromkeys(model.composite.names, scale)
    guided = bool(model.classes) or guiding is not None or config.guidance_from == "inside"
    return {
        "name": name,
        "classes": list(model.classes),
        "streams": list(model.composite.names),
        "plan": plan_stream(model),
        "columns": COLUMNS,
        "side": {"semantic": model.composite[plan_stream(model)].grid, "image": min(image_side(model), side)},
        "brush": brush_grid(model),
        "delta": trained_delta(model),
        "guided": guided,
        "solvers": list(SOLVERS),
        "limits": {"steps": MAX_STEPS, "count": MAX_COUNT, "delta": MAX_DELTA, "scale": MAX_SCALE, "seed": MAX_SEED},
        "start": {"solver": solver, "steps": min(config.steps, MAX_STEPS),
                  "guidance": {each: scales.get(each, 1.0) if guided else 1.0 for each in model.composite.names}},
        "results": [],
    }  # fmt: skip


def compute(
    model: Model,
    request: Request,
    stop: Callable[[], bool] = lambda: False,
    *,
    guiding: Model | None = None,
    side: int = MAX_SIDE,
    pixels: int = MAX_PIXELS,
    **settings: Any,
) -> dict[str, Any]:
    """Draw what is asked for.

    Args:
        model: the generator.
        request: see `Request`.
        stop: called between steps; true ends the work by `Superseded`.
        guiding: another model, to guide with.
        side: pixels of an image's side at most.
        pixels: of all pictures together at most; there are fewer frames instead.
        settings: fields of `SamplingConfig` that differ from the model's own and that a request does not set.
    """
    config = _config(model, request, guiding, settings)
    seeds, labels = [request.seed], [request.label]
    if request.mode in OF_TWO:
        seeds.append(request.other_seed)
        labels = [request.label, request.other_label]
        labels = [None, None] if None in labels else labels
    titles = [_title(model, label, seed) for label, seed in zip(labels, seeds, strict=True)]
    source = Run(titles, initial_noise(seeds, model.composite), _indices(model, labels), model.schedule, stop)
    how = config.model_dump(mode="json") | {"guiding": guiding}
    latents = edit(model, source.noise, {}, _classes(labels), callback=source, **how)
    runs = [source]
    schedule = model.schedule if request.delta is None else _offset(model, request.delta)
    if request.mode != "sample":
        runs.append(_edited(model, request, latents, labels, schedule, stop, how))
    elif request.delta is not None:
        again = Run([f"Δ = {request.delta:g}"], source.noise, source.labels, schedule, stop)
        edit(model, source.noise, {}, _classes(labels), schedule=schedule.spec, callback=again, **how)
        runs.append(again)
    return {
        "panels": panels(model, runs, config, guiding, side, pixels),
        "schedules": [_curves(model, run.schedule) for run in runs],
        "warning": _warning(model, schedule),
        "summary": f"{config.summary()}; {source.states[-1].nfe} function evaluations",
    }


def _edited(
    model: Model,
    request: Request,
    latents: Tensor,
    labels: list[int | None],
    schedule: Schedule,
    stop: Callable[[], bool],
    how: dict[str, Any],
) -> Run:
    """The results of an edit of the samples `latents`."""
    count, streams, both = request.count, model.composite, [request.seed, request.other_seed]
    own, new = [request.seed] * count, [request.other_seed + k for k in range(count)]
    classes = [request.other_label] * count
    given: dict[str, Any] = {}
    if request.mode == "keep-plan":
        noise, titles = mixed_noise(streams, new, own), [f"same plan, texture of seed {seed}" for seed in new]
    elif request.mode == "change-plan":
        noise, titles = mixed_noise(streams, own, new), [f"same texture noise, plan of seed {seed}" for seed in new]
    elif request.mode == "swap-plans":
        noise, classes = mixed_noise(streams, both, both[::-1]), labels[::-1]
        titles = [f"texture of seed {a}, plan of seed {b}" for a, b in (both, both[::-1])]
    elif request.mode == "interpolate":
        noise, classes = between(mixed_noise(streams, both[:1] * 2, both), count, streams), [None] * count
        titles = [f"{k / max(1, count - 1):.0%} of the way to the second plan" for k in range(count)]
    elif request.mode == "sdedit":
        new = [seed + 1 for seed in new]  # the second sample has the noise of `other_seed`
        noise, classes, given = mixed_noise(streams, new), labels[:1] * count, {"start": request.start}
        titles = [f"first plan, second texture, noise of seed {seed}" for seed in new]
    else:
        noise, titles = mixed_noise(streams, new), [f"painted, seed {seed}" for seed in new]
        given = {"brush": _brush(model, request.brush), "keep_texture": request.keep_texture}
    run = Run(titles, noise, _indices(model, classes), schedule, stop)
    how = how | given | {"schedule": schedule.spec, "callback": run, "classes": _classes(classes)}
    edit_by_name(model, request.mode, latents, both, new, **how)
    return run


def _title(model: Model, label: int | None, seed: int) -> str:
    return f"{'no class' if label is None else model.classes[label]}, seed {seed}" if model.classes else f"seed {seed}"


def _config(model: Model, request: Request, guiding: Model | None, settings: dict[str, Any]) -> SamplingConfig:
    for label in (request.label, request.other_label):
        if label is not None and label >= len(model.classes):
            raise SFDError(f"there is no class {label}; this model has {len(model.classes)}, from 0")
    scales, everywhere = set(request.guidance.values()), set(request.guidance) == set(model.composite.names)
    guidance = scales.pop() if everywhere and len(scales) == 1 else request.guidance
    own = model.config(**settings)
    changed: dict[str, Any] = {"solver": request.solver, "steps": request.steps, "guidance": guidance, "batch_size": 8}
    if request.solver != own.solver:
        changed["options"] = {}
    if own.guidance_from == "guiding_model" and guiding is None:
        changed["guidance_from"] = "null_class"
    return model.config(**settings | changed)


def _indices(model: Model, labels: list[int | None]) -> list[int]:
    return [model.transformer.null_class if label is None else label for label in labels]


def _classes(labels: list[int | None]) -> list[str | int] | None:
    given: list[str | int] = [label for label in labels if label is not None]
    return given or None


def brush_grid(model: Model) -> int:
    """Rows and columns of the brush: those of the finest stream."""
    return min(MAX_BRUSH_GRID, max(stream.grid for stream in model.composite.streams))


def _brush(model: Model, cells: tuple[int, ...]) -> Tensor:
    grid = brush_grid(model)
    if len(cells) != grid**2:
        raise SFDError(f"the brush has {grid} times {grid} cells, but {len(cells)} were given")
    if not any(cells):
        raise SFDError("the brush is empty; mark the part that is to be redrawn")
    return torch.tensor(cells, dtype=torch.float32).view(grid, grid)


def trained_delta(model: Model) -> float | None:
    """Δ that the model was trained with; None: its schedule is no offset."""
    spec = model.schedule.spec
    return {"offset": spec.get("delta"), "synchronous": 0.0, "sequential": 1.0}.get(spec["name"])


def _offset(model: Model, delta: float) -> Schedule:
    """The offset schedule with another Δ, and with the model's leading streams."""
    others = [name for name in model.composite.names if name != TEXTURE]
    leaders = model.schedule.spec.get("leaders", others)
    return build_schedule({"name": "offset", "delta": delta, "leaders": list(leaders)}, model.composite.names)


def _curves(model: Model, schedule: Schedule) -> dict[str, Any]:
    curves = schedule_curves(model, schedule)
    return {"u": curves.base.round(5).tolist(), "t": curves.times.round(5).tolist(), "knots": list(curves.knots)}


def _warning(model: Model, schedule: Schedule) -> str | None:
    """Say how far from training a schedule leads: the largest distance of a pair of times to the model's own curve."""
    own, asked = (torch.from_numpy(schedule_curves(model, each).times) for each in (model.schedule, schedule))
    away = torch.cdist(asked, own, p=math.inf).amin(dim=1).max().item()
    if away < SEEN:
        return None
    trained = trained_delta(model)
    named = f"Δ = {trained:g}" if trained is not None else f"the schedule {model.schedule.spec['name']!r}"
    return (
        f"This model was trained with {named}. With Δ = {schedule.spec['delta']:g} the network gets pairs of times up "
        f"to {away:.2f} away from any that it has seen."
    )
