"""Guided sampling to decoded images at equal error: the published sampler's settings against ours, on the same weights.

Published: dopri5 over the whole of [0, 1] at rtol 1e-3 and atol 1e-6, float32 (on a GPU TF32), not compiled, four
images at a time. Ours: the multistep method, compiled, all images at once, in float32 or bf16, with the fewest steps
whose median latent error against a converged solution is at most a limit: that of the published settings, and 1e-2.

`tiny` is models/shapes, guided by the null class. An adaptive solver's steps on random weights say nothing, and larger
trained models are not at hand: those of other sizes have the published initialisation, what it sets to zero drawn with
variance 1/width, and output heads fitted by least squares to flow matching on 64×64 procedural images, each 4×4 patch
in its 48 principal components. They are guided by a model of the next smaller size with the same class (AutoGuidance),
and decoded by the published f16d32 architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import CLASSES, COMPOSITE, MODEL, SCHEDULE, Row, Setting, config, now, peak
from sfd.data.images import to_pixels, to_tensor
from sfd.data.shapes import ShapesSource
from sfd.encoders import kl
from sfd.flow import sample_base_time
from sfd.generation.config import SamplingConfig
from sfd.generation.model import Model, load_model
from sfd.latents import TEXTURE
from sfd.models.dit import LightningDiT
from sfd.sampling import initial_noise, integrate
from sfd.utils import rng

SMALLER = {"S": "tiny", "B": "S", "L": "B", "XL": "B", "XXL": "B"}
FITTED, PART = 64, 16  # images that heads are fitted on, and at once
TOGETHER, LIMIT = 4, 1e-2  # images of the published sampler, and median error
STEPS = (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 40)
CONVERGED = {"tiny": 100}  # steps of the multistep method of order 3 whose result counts as exact
TRAINED_STEPS = 22  # that models/shapes needs for an error of 1e-2 in bf16; fitted heads have a smoother velocity
GUIDANCE = {"tiny": 2.0}  # others 1.5, as published for AutoGuidance
DEFAULT = {"cpu": (("tiny", 40), ("S", 4), ("B", 4)), "cuda": (("XL", 64), ("XXL", 64))}


class Sampling(NamedTuple):
    """What a way to sample gives, and the seconds that it takes."""

    latents: Tensor  # (B, N)
    nfe: float  # per image
    integrating: float
    decoding: float

    @property
    def seconds(self) -> float:
        """Of both parts."""
        return self.integrating + self.decoding


class Comparison:
    """Sampling `count` images of one model, one way after the other."""

    def __init__(self, size: str, count: int, device: torch.device) -> None:
        self.size, self.count, self.device = size, count, device
        self.model = load_model(MODEL, device) if size == "tiny" else fitted(size, device)
        self.guiding = fitted(SMALLER[size], device) if size in SMALLER else None
        source = "guiding_model" if self.guiding else "null_class"
        self.errors: dict[tuple[str, int], float] = {}
        self.how = {"guidance": GUIDANCE.get(size, 1.5), "guidance_from": source}

    @cached_property
    def converged(self) -> Tensor:
        """What counts as exact."""
        how = SamplingConfig(steps=CONVERGED.get(self.size, 24), **self.how)
        return self.integrated(how, range(self.count), knots=True)[0]

    def settings(self, steps: int, precision: str, setting: Setting) -> SamplingConfig:
        """Ours."""
        ours = {"precision": precision, "compile": setting.compiles, "options": {"order": 2}}
        return SamplingConfig(steps=steps, **ours, **self.how)

    def integrated(self, how: SamplingConfig, seeds: range, knots: bool) -> tuple[Tensor, int]:
        """Latents and NFE."""
        labels = torch.tensor(seeds, device=self.device) % len(self.model.classes)
        noise = initial_noise(seeds, self.model.composite).to(self.device)
        field = self.model.velocity_field(labels, how, self.guiding)
        chosen = {"solver": how.solver, "steps": how.steps, "options": how.options, "knots": knots}
        return integrate(field, noise, self.model.schedule, self.model.composite, **chosen)

    def published(self) -> Sampling:
        """Sample by the published settings."""
        how = SamplingConfig(solver="dopri5", options={"rtol": 1e-3, "atol": 1e-6}, **self.how)
        torch.set_float32_matmul_precision("high")
        try:
            parts = [
                self._published(how, range(k, min(k + TOGETHER, self.count))) for k in range(0, self.count, TOGETHER)
            ]
        finally:
            torch.set_float32_matmul_precision("highest")
        latents, nfe, integrating, decoding = zip(*parts, strict=True)
        return Sampling(torch.cat(latents), sum(nfe) / len(nfe), sum(integrating), sum(decoding))

    def _published(self, how: SamplingConfig, seeds: range) -> Sampling:
        start = now(self.device)
        latents, nfe = self.integrated(how, seeds, knots=False)
        middle = now(self.device)
        composite = self.model.composite
        with torch.no_grad():  # Model.decode would leave out TF32
            to_pixels(self.model.texture.decode(composite.denormalize(composite.unpack(latents))[TEXTURE])).cpu()
        return Sampling(latents, nfe, middle - start, now(self.device) - middle)

    def ours(self, how: SamplingConfig) -> Sampling:
        """Sample by the multistep method."""
        start = now(self.device)
        latents, nfe = self.integrated(how, range(self.count), knots=True)
        middle = now(self.device)
        self.model.decode(latents, how.precision)
        return Sampling(latents, nfe, middle - start, now(self.device) - middle)

    def reached(self, how: SamplingConfig) -> float:
        """The error of ours, computed once; the first call compiles."""
        key = how.precision, how.steps
        if key not in self.errors:
            self.errors[key] = self.error(self.integrated(how, range(self.count), knots=True)[0])
        return self.errors[key]

    def error(self, latents: Tensor) -> float:
        """Median over images of the relative error of the whole latents."""
        return ((latents - self.converged).norm(dim=1) / self.converged.norm(dim=1)).median().item()


def guided(setting: Setting) -> Iterator[Row]:
    """Images per second of each way, and its error."""
    default = DEFAULT.get(setting.device.type, DEFAULT["cpu"])[: 1 if setting.quick else None]
    for size, count in setting.given or default:
        case = Comparison(size, count, setting.device)
        peak(setting.device)
        base = case.published()
        for name, precision, way in _ways(case, base, setting):
            memory = peak(setting.device)
            row: Row = {"size": size, "way": name, "precision": precision, "batch": TOGETHER if way is base else count}
            row |= {"nfe": way.nfe, "median_latent_error": case.error(way.latents)}
            milliseconds = 1e3 / count
            row |= {"sampling_milliseconds": milliseconds * way.integrating}
            row |= {"decoding_milliseconds": milliseconds * way.decoding}
            row |= {"images_per_second": count / way.seconds, "ratio": base.seconds / way.seconds}
            yield row | {"ratio_without_decoding": base.integrating / way.integrating} | memory
            peak(setting.device)  # without that of the converged solution
        torch._dynamo.reset()  # it refuses to compile one function for many networks


def compiling(setting: Setting) -> Iterator[Row]:
    """Seconds that the networks take to compile; they then are in the compiler's cache."""
    for size, count in setting.sizes:
        case = Comparison(size, count, setting.device)
        for precision in ("bf16", "float32"):
            start = now(setting.device)
            case.integrated(case.settings(4, precision, setting), range(count), knots=True)
            yield {"size": size, "batch": count, "way": precision, "first_call_seconds": now(setting.device) - start}
        torch._dynamo.reset()


def _ways(case: Comparison, base: Sampling, setting: Setting) -> Iterator[tuple[str, str, Sampling]]:
    """Names, precisions and samplings of a comparison's rows."""
    yield "published", "float32", base
    limits = {"ours, error of the published": case.error(base.latents), f"ours, error of {LIMIT:g}": LIMIT}
    for name, most in limits.items():
        if best := min(_fewest(case, most, setting), key=lambda each: each[1].seconds, default=None):
            yield name, *best
    if case.size != "tiny":
        yield f"ours, {TRAINED_STEPS} steps", "bf16", case.ours(case.settings(TRAINED_STEPS, "bf16", setting))


def _fewest(case: Comparison, most: float, setting: Setting) -> Iterator[tuple[str, Sampling]]:
    """The sampling with the fewest steps whose error is at most `most`, in bf16; float32 if that fails, or for tiny."""
    for precision in ("bf16", "float32"):
        errors: list[float] = []
        for steps in STEPS:
            errors.append(case.reached(case.settings(steps, precision, setting)))
            if errors[-1] <= most:
                yield precision, case.ours(case.settings(steps, precision, setting))
                if case.size != "tiny":
                    return
                break
            if len(errors) > 2 and errors[-1] > 0.95 * errors[-3]:  # rounding, which more steps do not mend
                break


@torch.no_grad()
def fitted(size: str, device: torch.device) -> Model:
    """A model of a published size whose output heads fit the velocity of procedural images best."""
    with rng.seeded(0, size):
        network = LightningDiT(config(size))
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=network.config.width**-0.5)
        texture = kl.PublishedAutoencoder(kl.Config())
        network.eval().requires_grad_(False).to(device)
        _fit(network, device)
    model = Model(network, SCHEDULE, texture.eval().requires_grad_(False), tuple(map(str, range(CLASSES))))
    return model.to(device)


def _fit(network: LightningDiT, device: torch.device) -> None:
    """Fit the heads by least squares, given the tokens that they receive."""
    received: list[Tensor] = []
    hook = network.heads[0].register_forward_pre_hook(lambda module, given: received.append(given[0]))
    gram = cross = torch.zeros(())
    x1, labels = procedural_latents(FITTED)
    for data, classes in zip(x1.split(PART), labels.split(PART), strict=True):
        noise = torch.randn_like(data)
        times = SCHEDULE.at(sample_base_time(torch.randn(len(data)), "logit_normal")).time
        x = torch.lerp(noise, data, COMPOSITE.per_entry(times))
        network(x.to(device), times.to(device), classes.to(device))
        tokens = nn.functional.pad(received.pop().flatten(0, 1).cpu().double(), (0, 1), value=1.0)
        target = COMPOSITE.per_position(data - noise).mT.flatten(0, 1).double()
        gram, cross = gram + tokens.T @ tokens, cross + tokens.T @ target
    hook.remove()
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram + ridge, cross).split([s.channels for s in COMPOSITE.streams], dim=1)
    for head, weight in zip(network.heads, weights, strict=True):
        head.weight.copy_(weight[:-1].T)
        head.bias.copy_(weight[-1])


def procedural_latents(count: int) -> tuple[Tensor, Tensor]:
    """Packed latents (count, N) and labels: principal components of 4×4 patches, the first 16 as semantic stream."""
    source = ShapesSource(count, seed=0, image_size=64)
    patches = nn.functional.pixel_unshuffle(to_tensor(source.load(range(count))), 4).flatten(2).mT
    rows = patches.flatten(0, 1) - patches.mean((0, 1))
    components = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)
    latents = (components / components.std(0)).reshape(count, 16, 16, 48).permute(0, 3, 1, 2)
    packed = COMPOSITE.pack({"texture": latents[:, 16:], "semantic": latents[:, :16]})
    return packed, torch.from_numpy(source.labels)
