"""What a recipe will take, before anything is trained: parameters, operations, time and memory."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from sfd.config import Recipe, dump_recipe
from sfd.evaluation.report import duration
from sfd.models.transformer import TransformerConfig, flops, parameter_count
from sfd.plan import check, planned_compressor, planned_encoder

# A training step costs a forward and a backward pass, the latter twice the former.
PASSES_A_STEP = 3
# Share of the matrix-product rate that small networks reach here in training; seen between 0.3 and 0.5.
EFFICIENCY = 0.4


def describe(recipe: Recipe, device: torch.device) -> str:
    """Write the resolved recipe and its estimates as text."""
    config = check(recipe)
    forward, rate = flops(config), matrix_rate(device, recipe.train.precision)
    images = recipe.train.steps * recipe.train.batch_size
    seconds = images * forward * PASSES_A_STEP / (rate * EFFICIENCY)
    rows = {
        "data": _data(recipe),
        "transformer": f"{parameter_count(config):,} parameters, {config.composite.token_grid**2} tokens",
        "texture encoder": _count(planned_encoder(recipe.texture)),
        "semantic encoder": _count(planned_encoder(recipe.semantic)),
        "operations": f"{forward / 1e9:.3g} GFLOP an image forward, "
        f"{_step_flops(recipe, forward) / 1e12:.3g} TFLOP a training step",
        "training": f"{recipe.train.steps:,} steps, {images:,} images seen",
        "this machine": f"{rate / 1e12:.3g} TFLOP/s in {recipe.train.precision} matrix products on {device}",
        "estimated time": f"{duration(seconds)} for the transformer alone, at {EFFICIENCY:.0%} of that rate",
        "estimated memory": f"{_memory(recipe, config) / 2**30:.2f} GiB in training, the framework's own not counted",
    }
    compressor = planned_compressor(recipe)
    if compressor is not None:
        rows["compressor"] = f"{_count(compressor)} ({recipe.compressor.name})"
    width = max(map(len, rows))
    return dump_recipe(recipe) + "\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def matrix_rate(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Measure operations a second of a square matrix product, best of what fits in `seconds`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end or best == 0:
        start = time.monotonic()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.monotonic() - start))
    return best


def _data(recipe: Recipe) -> str:
    source = recipe.data.source
    if source == "shapes":
        return f"shapes, {recipe.data.count:,} images"
    return source if Path(source).exists() else f"{source} is not there; give data.source=FOLDER"


def _count(part: nn.Module) -> str:
    return f"{sum(p.numel() for p in part.parameters()):,} parameters"


def _step_flops(recipe: Recipe, forward: int) -> float:
    return float(forward * PASSES_A_STEP * recipe.train.batch_size)


def _memory(recipe: Recipe, config: TransformerConfig) -> float:
    """Weights, gradients, two moments and the average in float32, and what the backward pass keeps of each block."""
    copies = 5 if recipe.train.ema is not None else 4
    state = 4.0 * copies * parameter_count(config)
    bytes_each = 2 if recipe.train.precision == "bf16" else 4
    tokens = recipe.train.batch_size // recipe.train.accumulate * config.composite.token_grid**2
    kept = config.width if config.checkpointing else 24 * config.width  # floats a token a block
    return state + bytes_each * tokens * config.depth * kept
