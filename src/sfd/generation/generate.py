"""From seeds and classes to images: noise, guided integration, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from sfd.data.images import to_pixels
from sfd.generation.model import TEXTURE_STREAM, Model
from sfd.guidance import Guided, Pair, VelocityField, guide
from sfd.latents import CompositeLatent
from sfd.models.dit import flops
from sfd.models.inference import Compile, Inference, Precision, compiling_pays, require_compiler
from sfd.pieces import LEAST_SHIFT, MOST_SHIFT, SLIVER
from sfd.sampling import Progress, check_plan, check_seeds, initial_noise, integrate
from sfd.schedules import Schedule
from sfd.solvers import load_solver
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError

DEFAULT_STEPS = 25
DEFAULT_BATCH_SIZE = 64
ADAPTIVE_EVALUATIONS = 100  # what an adaptive solver is taken to spend, to decide whether compiling pays
DECODED_AT_ONCE = 32  # images: pixels take far more memory than latents


class SamplingConfig(Settings):
    """How images are sampled."""

    solver: str = Field("multistep", description="a module of sfd.solvers")
    steps: int | None = Field(
        None, description="over the whole interval; null: 25, or the solver's own choice if it is adaptive"
    )
    options: dict[str, Any] = Field({}, description="of the solver, such as rtol")
    shift: float = Field(
        1.0, ge=LEAST_SHIFT, le=MOST_SHIFT, description="time shift; below 1 puts more steps near noise"
    )
    budget: Literal["length", "equal", "time"] | tuple[float, ...] = Field(
        "length",
        description="steps of each segment between knots: by its length, equal, by stream time travelled, or weights",
    )
    guidance: float | dict[str, float] = Field(1.0, description="scale for all streams, or by stream; 1: none")
    interval: tuple[float, float] | dict[str, tuple[float, float]] | None = Field(
        None, description="stream times within which to guide, for all streams or by stream; null: throughout"
    )
    weak_every: int = Field(1, gt=0, description="evaluate the weak model at one in so many evaluations")
    weak_between: Literal["hold", "extrapolate"] = Field("hold", description="what guides in between")
    paired: bool = Field(
        False, description="strong and weak in one call of twice the batch; only where they are one network"
    )
    batch_size: int | None = Field(
        None,
        gt=0,
        description="images at a time; changes them by rounding alone, but for adaptive solvers; null: as many as a "
        "GPU's memory holds, else 64",
    )
    precision: Precision = Field("float32", description="bf16: matrix products and convolutions")
    compile: Compile = Field(
        "auto", description="the network, which takes a minute or two; auto: where that is less than it saves"
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _read_compile(cls, value: Any) -> Any:
        # YAML reads a plain `on` and `off` as booleans.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @property
    def guides(self) -> bool:
        """Whether a stream is guided: its scale is other than 1."""
        scales = self.guidance.values() if isinstance(self.guidance, dict) else (self.guidance,)
        return any(scale != 1 for scale in scales)

    @property
    def resolved_steps(self) -> int | None:
        """The number of steps that will be taken; None for a solver that chooses its own."""
        if self.steps is None and not load_solver(self.solver)[0].ADAPTIVE:
            return DEFAULT_STEPS
        return self.steps


def without_guidance(settings: SamplingConfig) -> SamplingConfig:
    """Give the same settings with the strong model alone."""
    alone = {"guidance": 1.0, "interval": None, "weak_every": 1, "weak_between": "hold", "paired": False}
    return settings.model_copy(update=alone)


def with_compile(settings: SamplingConfig, model: Model, weak: Model | None, images: int) -> SamplingConfig:
    """Decide whether compiling pays for so many images, if that was left open."""
    if settings.compile != "auto":
        return settings
    operations = flops(model.transformer.config)
    if settings.guides:
        operations += flops((weak or model).transformer.config) // settings.weak_every
    operations *= images * (settings.resolved_steps or ADAPTIVE_EVALUATIONS)
    return settings.model_copy(update={"compile": "on" if compiling_pays(operations, model.device) else "off"})


class SampleBatch(NamedTuple):
    """One batch of images."""

    first: int  # number of the batch's first image
    images: np.ndarray  # uint8 (B, S, S, 3)
    latents: Tensor  # (B, N) packed, normalised, on the CPU
    evaluations: int  # velocity evaluations spent, a guided one counted once
    weak_evaluations: int  # in how many of them the weak model took part


def generate(
    model: Model,
    labels: Sequence[int],
    seeds: Sequence[int],
    settings: SamplingConfig,
    *,
    weak: Model | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Iterator[SampleBatch]:
    """Sample image i with labels[i] from seeds[i] alone, batch by batch.

    Args:
        model: the generator.
        labels: class indices; the null class (the number of classes) asks for none.
        seeds: one an image, ≥ 0.
        settings: solver, steps, guidance.
        weak: a weaker model for AutoGuidance; None: the null class is the weak model (classifier-free guidance).
        callback: called after each solver step of each batch.

    Raises:
        SFDError: settings that do not fit the model, each other or this machine. Raised before anything is computed.
    """
    check_sampling(model.schedule, model.composite, settings, has_weak=weak is not None or bool(model.classes))
    if settings.compile == "on":
        require_compiler(model.device)
    if len(labels) != len(seeds):
        raise SFDError(f"{len(labels)} labels were given for {len(seeds)} seeds; give one label a seed")
    check_seeds(seeds)
    _check_weak(model, weak)
    if weak is not None and settings.paired:
        raise SFDError(
            "paired evaluates one network once with both labels, but the weak model is another; leave it out"
        )
    return _batches(model, labels, seeds, with_compile(settings, model, weak, len(seeds)), weak, callback)


def check_sampling(schedule: Schedule, composite: CompositeLatent, settings: SamplingConfig, *, has_weak: bool) -> None:
    """Check that solver, steps, shift and guidance fit the schedule, the streams and each other.

    Raises:
        SFDError: they do not, or one of them would do nothing; also guidance without anything to be guided away from
            (`has_weak`).
    """

    def still(x: Tensor, times: Tensor) -> Tensor:
        return torch.zeros_like(x)

    guided = guide(still, still if has_weak else None, settings.guidance, composite, settings.interval)
    _check_interval(settings)
    if not settings.guides and (settings.weak_every > 1 or settings.paired):
        raise SFDError(
            "weak_every or paired was given, but no guidance scale other than 1: there is no weak model to ask"
        )
    if settings.weak_between != "hold" and settings.weak_every == 1:
        raise SFDError(
            f"weak_between is {settings.weak_between!r}, but weak_every is 1, so that nothing lies in between; "
            "give weak_every 2 or more, or leave weak_between out"
        )
    if settings.weak_every > 1 and settings.resolved_steps is None:
        raise SFDError(
            f"solver {settings.solver!r} chooses its steps by how smooth the velocity is, and a weak velocity that is "
            "reused makes it jump; leave weak_every out, or take a solver with fixed steps"
        )
    check_plan(
        schedule,
        settings.solver,
        settings.resolved_steps,
        settings.options,
        settings.shift,
        settings.budget,
        guided.jumps if isinstance(guided, Guided) else None,
    )


def _check_interval(settings: SamplingConfig) -> None:
    """Refuse an interval that guides nothing; `guide` has checked its names and the order of its ends."""
    scale, interval = settings.guidance, settings.interval
    if interval is None:
        return
    if not settings.guides:
        raise SFDError("a guidance interval was given, but no guidance scale other than 1; give both or neither")
    for name in interval if isinstance(interval, dict) else ():
        if isinstance(scale, dict) and scale.get(name, 1.0) == 1:
            raise SFDError(
                f"a guidance interval was given for stream {name!r}, but its guidance scale is 1, so it would do "
                "nothing; give the stream a scale too, or leave its interval out"
            )
    for low, high in interval.values() if isinstance(interval, dict) else (interval,):
        if high - low <= SLIVER:
            raise SFDError(
                f"a guidance interval from {low} to {high} would guide nothing; give one such as 0.2 to 0.8, or leave "
                "guidance out"
            )


def _batches(
    model: Model,
    labels: Sequence[int],
    seeds: Sequence[int],
    settings: SamplingConfig,
    weak: Model | None,
    callback: Callable[[Progress], None] | None,
) -> Iterator[SampleBatch]:
    size = settings.batch_size or DEFAULT_BATCH_SIZE
    for start in range(0, len(seeds), size):
        end = start + size
        batch_labels = torch.tensor(labels[start:end], dtype=torch.long, device=model.device)
        velocity = _guided(model, weak, batch_labels, settings)
        result = integrate(
            velocity,
            initial_noise(seeds[start:end], model.composite).to(model.device),
            model.schedule,
            model.composite,
            solver=settings.solver,
            steps=settings.resolved_steps,
            options=settings.options,
            shift=settings.shift,
            budget=settings.budget,
            seeds=seeds[start:end],
            callback=callback,
        )
        weak_evaluations = velocity.weak_evaluations if isinstance(velocity, Guided) else 0
        yield SampleBatch(
            start, decode(model, result.x, settings.precision), result.x.cpu(), result.evaluations, weak_evaluations
        )


@torch.no_grad()
def decode(
    model: Model, packed: Tensor, precision: Precision = "float32", *, at_once: int = DECODED_AT_ONCE
) -> np.ndarray:
    """Decode the texture stream of packed, normalised latents (B, N) to uint8 images (B, S, S, 3), `at_once` a call."""
    latents = model.composite.denormalize(model.composite.unpack(packed))[TEXTURE_STREAM].to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, precision == "bf16"):
        pixels = [to_pixels(model.texture.decode(z).float()) for z in latents.split(at_once)]
    return torch.cat(pixels).cpu().numpy()


def velocity_field(network: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor) -> VelocityField:
    """Make a velocity function of a network and one label an image."""

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        return network(x, times, labels)

    return velocity


def _guided(model: Model, weak: Model | None, labels: Tensor, settings: SamplingConfig) -> VelocityField:
    how = settings.precision, settings.compile == "on"
    network = model.inference(*how)
    strong = velocity_field(network, labels)
    null = torch.full_like(labels, model.transformer.null_class)
    if weak is not None:
        weaker: VelocityField | None = velocity_field(weak.inference(*how), labels)
    else:
        # Without classes the null class is the model itself, and there is nothing to be guided away from.
        weaker = velocity_field(network, null) if model.classes else None
    return guide(
        strong,
        weaker,
        settings.guidance,
        model.composite,
        settings.interval,
        weak_every=settings.weak_every,
        weak_between=settings.weak_between,
        pair=pair(network, labels, null) if settings.paired else None,
    )


def pair(network: Inference, labels: Tensor, null: Tensor) -> Pair:
    """Make a function that evaluates a network with labels and with none in one call."""
    both = velocity_field(network, torch.cat([labels, null]))

    def evaluate(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        doubled = times if times.dim() == 1 else times.repeat(2, 1)
        wanted, weak = both(x.repeat(2, 1), doubled).chunk(2)
        return wanted, weak

    return evaluate


def _check_weak(model: Model, weak: Model | None) -> None:
    if weak is None:
        return
    if weak.classes != model.classes:
        raise SFDError(
            f"the guiding model has classes {', '.join(weak.classes)}, the guided one {', '.join(model.classes)}; "
            "guide with a model of the same data"
        )
    if weak.composite.names != model.composite.names:
        raise SFDError(
            "the guiding model has other streams than the guided one; guide with a model of the same latents"
        )
    for ours, theirs in zip(model.composite.streams, weak.composite.streams, strict=True):
        for field in ("shape", "tokenizer", "mean", "std"):
            if getattr(ours, field) != getattr(theirs, field):
                raise SFDError(
                    f"stream {ours.name!r} of the guiding model has {field} {getattr(theirs, field)}, "
                    f"of the guided one {getattr(ours, field)}; guide with a model of the same latents"
                )
