"""Estimates of a recipe before training: parameters, operations, time and memory.

Nothing is allocated, loaded or downloaded: networks are built on the meta device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sfd.encoders._hub import local
from sfd.generation.config import GUIDED_BY, SamplingConfig
from sfd.generation.directory import model_config
from sfd.models.dit import DiTConfig, flops, parameter_count, projector_flops, second_head_flops
from sfd.run.recipe import EncoderSettings, Recipe, dump_recipe
from sfd.run.validate import check, latent_bytes, planned_compressor, planned_encoder
from sfd.utils.errors import SFDError
from sfd.utils.units import duration

# A training step costs a forward and a backward pass, the latter twice the former.
PASSES_PER_STEP = 3
# Share of the matrix-product rate that small networks reach here in training; seen between 0.3 and 0.5.
EFFICIENCY = 0.4
# What the backward pass keeps of a block, bytes per token and channel (d: width; the MLP is 8/3·d wide), by precision:
# float32: normalised inputs of two norms 4 + 4, their outputs 4 + 4, queries, keys and values 12, normalised and
#          rotated queries and keys 8 + 8, attention's output 4, both halves' outputs before their gates 4 + 4,
#          the MLP's two inputs, its SiLU and its product 8/3·16.
# bf16:    the same with 2 bytes per number, except in the norms and at the gates, which stay float32.
KEPT_BYTES = {"float32": 56 + 8 / 3 * 16, "bf16": 40 + 8 / 3 * 8}


class Estimate(NamedTuple):
    """Numbers that follow from a recipe alone."""

    config: DiTConfig
    parameters: int  # trained, with the REPA projector
    published_parameters: int  # as published counts them: the fixed position table is among them
    forward: int  # operations of the network on one image, 2 a multiply-add; without the projector
    step: int  # operations of a training step
    training: int  # operations of all steps
    state: int  # bytes of weights, gradients, moments, average
    kept: int  # bytes that the backward pass keeps of one image
    images_at_once: int  # in one backward pass

    def seconds(self, rate: float) -> float:
        """Time of the transformer's training at `rate` operations per second."""
        return self.training / rate

    @property
    def memory(self) -> int:
        """Bytes in training on one device, without those of the framework."""
        return self.state + self.kept * self.images_at_once


def estimate(recipe: Recipe) -> Estimate:
    """Compute the estimates of a recipe."""
    config, train = check(recipe, dry=True), recipe.train
    parameters, forward = parameter_count(config), flops(config)
    step = PASSES_PER_STEP * (forward + projector_flops(config) + second_head_flops(config)) * train.batch_size
    return Estimate(
        config=config,
        parameters=parameters,
        published_parameters=parameters + config.composite.token_grid**2 * config.width,
        forward=forward,
        step=step,
        training=step * train.steps,
        state=_state_bytes(recipe, parameters),
        kept=kept_bytes(config, train.precision),
        images_at_once=train.batch_size // train.accumulate,
    )


def describe(recipe: Recipe, device: torch.device, tflops: float | None = None) -> str:
    """Write the resolved recipe and its estimates as text.

    Args:
        recipe: what to plan.
        device: where it would run.
        tflops: 10¹² operations per second that training reaches; None: measured here, as a share of the matrix rate.
    """
    known = estimate(recipe)
    rate, how = _rate(device, recipe.train.precision, tflops)
    images = recipe.train.steps * recipe.train.batch_size
    rows = {
        "published": ", ".join(f"{k} {_number(v)}" for k, v in recipe.published.items()) or "nothing",
        "data": _data(recipe),
        "transformer": f"{known.parameters:,} trained parameters with REPA's projector; "
        f"{known.published_parameters:,} with the fixed position table, as published",
        "latent": f"{_streams(known.config)}; {known.config.composite.token_grid**2} tokens",
        "texture encoder": _encoder(recipe.texture),
        **_semantic(recipe),
        **_compressor(recipe),
        "latents on disk": _latents(recipe),
        "operations": f"{known.forward / 1e9:.4g} GFLOP per image forward (matrix products, 2 per multiply-add), "
        f"{known.step / 1e12:.4g} TFLOP per training step ({PASSES_PER_STEP} × (forward + REPA projector) × batch)",
        "training": f"{recipe.train.steps:,} steps of {recipe.train.batch_size}, {images:,} images, "
        f"{known.training / 1e18:.4g} EFLOP",
        "estimated time": f"{duration(known.seconds(rate))} on one device, for the transformer only, at {how}",
        "estimated memory": f"{known.state / 2**30:.2f} GiB of weights, gradients, AdamW's state and EMA, and "
        f"{known.kept / 2**20:.1f} MiB per image: {known.memory / 2**30:.2f} GiB with {known.images_at_once} per "
        "micro-batch on one device, without the framework's own",
        "samples": _samples(recipe, known),
    }
    width = max(map(len, rows))
    return dump_recipe(recipe) + "\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def table(recipes: Mapping[str, Recipe], tflops: float) -> str:
    """List recipes as a Markdown table: name in the table, purpose, published numbers, parameters and hours."""
    lines = [
        f"| recipe | purpose | published | parameters | hours at {tflops:g} TFLOP/s |",
        "|---|---|---|---:|---:|",
    ]
    for name, recipe in recipes.items():
        known = estimate(recipe)
        published = ", ".join(f"{k} {_number(v)}" for k, v in recipe.published.items())
        hours = known.seconds(tflops * 1e12) / 3600
        lines.append(f"| `{name}` | {recipe.note} | {published} | {known.published_parameters:,} | {hours:,.1f} |")
    return "\n".join(lines) + "\n"


def matrix_rate(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Measure operations per second of a square matrix product, best of the repetitions within `seconds`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end or best == 0:
        start = time.monotonic()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.monotonic() - start))
    return best


def _rate(device: torch.device, precision: str, tflops: float | None) -> tuple[float, str]:
    """Operations per second that training reaches, and the source of the number."""
    if tflops is not None:
        return tflops * 1e12, f"{tflops:g} TFLOP/s"
    peak = matrix_rate(device, precision)
    return peak * EFFICIENCY, f"{EFFICIENCY:.0%} of the {peak / 1e12:.3g} TFLOP/s of {precision} products on {device}"


def _state_bytes(recipe: Recipe, parameters: int) -> int:
    """Bytes of weights, gradients, AdamW's two moments and EMA in float32, and of autocast's copy of the weights."""
    return parameters * (16 + 4 * (recipe.train.ema is not None) + 2 * (recipe.train.precision == "bf16"))


def kept_bytes(config: DiTConfig, precision: str) -> int:
    """Bytes of activations that the backward pass keeps per image."""
    tokens, block = config.composite.token_grid**2, KEPT_BYTES[precision] * config.width
    if not config.checkpointing:
        return round(tokens * block * config.depth)
    # Checkpointing keeps each block's float32 input, and one block whole while it is gone through again; the selective
    # kind the products too: queries, keys and values 3, attention and its output 1 each, SwiGLU 16/3 and 1 widths.
    products = (34 / 3 if config.checkpointing == "selective" else 0) * (2 if precision == "bf16" else 4)
    return round(tokens * ((4 + products) * config.width * config.depth + block))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _data(recipe: Recipe) -> str:
    source = recipe.data.source
    if source is None:
        return "no images"
    if source == "shapes":
        return f"shapes, {recipe.data.count:,} images"
    return source if Path(source).exists() else f"{source} is missing; give data.source=FOLDER"


def _streams(config: DiTConfig) -> str:
    return ", ".join(f"{s.name} {s.channels}×{s.grid}×{s.grid} patch {s.patch_size}" for s in config.composite.streams)


def _latents(recipe: Recipe) -> str:
    if recipe.latents.published is not None:
        here = Path(recipe.latents.published).is_dir()
        return f"published, in {recipe.latents.published}{'' if here else ', which is missing'}"
    latents, features = latent_bytes(recipe)
    total = (
        f"{(latents + features) / 2**10:.4g} KiB per image, {(latents + features) * 1e6 / 2**30:.4g} GiB per million"
    )
    return f"{total}; of that, {features / (latents + features):.0%} features for REPA"


def _semantic(recipe: Recipe) -> dict[str, str]:
    if not recipe.encodes_semantics:
        return {}
    return {"semantic encoder": _encoder(recipe.semantic)}


def _encoder(settings: EncoderSettings) -> str:
    encoder = planned_encoder(settings)
    absent = settings.pretrained is not None and local(settings.pretrained) is None
    missing = f"; {settings.pretrained} is missing" if absent else ""
    return f"{settings.name}, {encoder.channels} channels, {encoder.downsample} pixels per position{missing}"


def _compressor(recipe: Recipe) -> dict[str, str]:
    compressor = planned_compressor(recipe)
    if compressor is None:
        return {}
    parts = {name: _count(part) for name, part in compressor.named_children()}
    text = ", ".join(f"{name} {count:,} parameters" for name, count in parts.items()) or "nothing trained by gradient"
    folder = recipe.compressor.folder
    missing = "" if folder is None or Path(folder).is_dir() else f"; {folder} is missing"
    return {"compressor": f"{text} ({recipe.compressor.name}){missing}"}


def _samples(recipe: Recipe, known: Estimate) -> str:
    classes, sample = recipe.data.classes, recipe.sample
    each = recipe.evaluation.samples_per_class
    count = f"{each * classes:,} ({each} per class)" if classes else f"{each} a class"
    return f"{count}, {_solver(sample)}, {_evaluation(recipe, known)}"


def _solver(sample: SamplingConfig) -> str:
    return sample.solver if sample.adaptive else f"{sample.solver} {sample.steps}"


def _evaluation(recipe: Recipe, known: Estimate) -> str:
    """Operations of one velocity evaluation per image, guided or not."""
    weak, guidance, source = recipe.evaluation.weak, recipe.sample.guidance, recipe.sample.guidance_from
    strong = f"{known.forward / 1e9:.4g} GFLOP per velocity"
    if not recipe.sample.guides:
        return f"unguided, {strong}"
    if weak is None:
        operations = known.forward * (2 if source == "null_class" else 1) + second_head_flops(known.config)
        return f"guidance {guidance} by {GUIDED_BY[source]}, {operations / 1e9:.4g} GFLOP per velocity"
    try:
        config = model_config(Path(weak))
    except SFDError:
        return f"guidance {guidance} by {weak}, which is missing: {strong} without it"
    both = (known.forward + flops(config)) / 1e9
    return f"guidance {guidance} by {weak} ({parameter_count(config):,} parameters), {both:.4g} GFLOP per velocity"


def _count(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())
