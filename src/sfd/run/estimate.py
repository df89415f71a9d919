"""Estimates of a recipe before training: parameters, operations, time and memory.

Nothing is allocated, loaded or downloaded: networks are built on the meta device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from sfd.encoders import encoder_module
from sfd.encoders._hub import local
from sfd.models.dit import parameter_count
from sfd.models.dit_config import DiTConfig, flops
from sfd.run.recipe import Recipe, dump_recipe
from sfd.run.validate import check, latent_bytes
from sfd.utils.shipped import MODEL, shipped
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
    parameters: int  # trained, with REPA's projector if there is one
    published_parameters: int  # as published counts them: the fixed position table is among them
    training: int  # operations of the transformer's training, 2 for a multiply-add of a matrix product
    state: int  # bytes of weights, gradients, AdamW's moments and EMA
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
    parameters = parameter_count(config)
    images = train.steps * train.batch_size
    operations = PASSES_PER_STEP * flops(config, training=True)
    # In float32 weights, gradients, two moments and EMA; autocast keeps a copy of the weights in bf16.
    bytes_per_parameter = 16 + 4 * (train.ema is not None) + 2 * (train.precision == "bf16")
    return Estimate(
        config=config,
        parameters=parameters,
        published_parameters=parameters + config.composite.token_grid**2 * config.width,
        training=operations * images,
        state=parameters * bytes_per_parameter,
        kept=kept_bytes(config, train.precision),
        images_at_once=train.batch_size // train.accumulate,
    )


def describe(recipe: Recipe, device: torch.device) -> str:
    """Write the resolved recipe and its estimates on a device as text; the matrix rate is measured here."""
    known, precision = estimate(recipe), recipe.train.precision
    peak = matrix_rate(device, precision)
    composite = known.config.composite
    rows = {
        "transformer": _network(recipe, known),
        "latent": ", ".join(f"{s.name} {s.channels}×{s.grid}×{s.grid} patch {s.patch_size}" for s in composite.streams)
        + f"; {composite.token_grid**2} tokens",
        "latents on disk": _latents(recipe),
        "training": f"{recipe.train.steps:,} steps of {recipe.train.batch_size}, "
        f"{known.training:.3g} floating-point operations",
        "estimated time": f"{duration(known.seconds(EFFICIENCY * peak))} on one device, for the transformer only, at "
        f"{EFFICIENCY:.0%} of the {peak / 1e12:.3g} TFLOP/s of {precision} products on {device}",
        "estimated memory": f"{known.state / 2**30:.2f} GiB of weights, gradients, AdamW's state and EMA, and "
        f"{known.kept / 2**20:.1f} MiB per image: {known.memory / 2**30:.2f} GiB with {known.images_at_once} per "
        "micro-batch on one device, without the framework's own",
        "not here yet": ", ".join(f"{name} is missing" for name in missing(recipe)) or "nothing",
    }
    width = max(map(len, rows))
    return dump_recipe(recipe) + "\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def missing(recipe: Recipe) -> list[str]:
    """List the folders and published weights that the recipe names and that are not on this machine."""
    encoders = [recipe.texture, recipe.semantic] if recipe.encodes_semantics else [recipe.texture]
    source = recipe.data.source if recipe.data.source != "shapes" else None
    folders = [source, recipe.latents.published, *(encoder.folder for encoder in encoders)]
    folders += [recipe.compressor.folder] if recipe.compresses_semantics else []
    absent = [folder for folder in folders if folder is not None and not Path(folder).exists()]
    guiding = recipe.evaluation.guiding_model
    if guiding is not None and not Path(guiding).exists() and guiding not in shipped(MODEL):
        absent.append(guiding)
    for encoder in encoders:
        find = getattr(encoder_module(encoder.name), "local", local)  # where its weights are no model of the hub
        if encoder.pretrained is not None and find(encoder.pretrained) is None:
            absent.append(encoder.pretrained)
    return absent


def table(recipes: Mapping[str, Recipe], tflops: float) -> str:
    """List recipes as a Markdown table: name in the table, purpose, published numbers, parameters and hours."""
    lines = [f"| recipe | purpose | published | parameters | hours at {tflops:g} TFLOP/s |", "|---|---|---|---:|---:|"]
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


def _network(recipe: Recipe, known: Estimate) -> str:
    text = f"{known.parameters:,} trained parameters"
    if known.config.repa_block is not None:
        text += ", REPA's projector included"
    if recipe.published:
        text += f"; {known.published_parameters:,} as the paper counts, with the fixed position table"
    classes = known.config.num_classes
    return text + (f"; {classes:,} classes" if classes else "; classes are counted when the data are read")


def _latents(recipe: Recipe) -> str:
    if recipe.latents.published is not None:
        return f"published, in {recipe.latents.published}"
    latents, features = latent_bytes(recipe)
    total = latents + features
    return (
        f"{total / 2**10:.4g} KiB per image, {total * 1e6 / 2**30:.4g} GiB per million; of that, "
        f"{features / total:.0%} features for REPA"
    )
