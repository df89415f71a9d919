"""Class and null class in one call of twice the batch, beside two calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sfd.generation.generate import pair, velocity_field

from benchmarks.speed.measuring import ROOT, Row, Setting, best_times, network
from sfd.generation.model import load_model
from sfd.models.dit import LightningDiT
from sfd.models.inference import Inference
from sfd.sampling import initial_noise


def paired(setting: Setting) -> list[Row]:
    """Images a second through a guided evaluation: of two calls, and of one."""
    device = setting.device
    demo = load_model(ROOT / "models" / "shapes", device)
    cases: list[tuple[str, LightningDiT, tuple[int, ...]]] = [("demo", demo.transformer, (1, 4, 8, 64))]
    for size, batch in setting.sizes:
        cases.append((size, network(size).eval().requires_grad_(False).to(device), (1, batch)))
    rows = []
    for name, made, batches in cases:
        for precision in ("float32", "bf16"):
            inference = Inference(made, precision)
            for batch in batches:
                ways = _ways(inference, batch, device)
                times = best_times(ways, 2 * setting.repeats, device)
                row = {"size": name, "batch": batch, "precision": precision}
                row |= {name: batch / seconds for name, seconds in times.items()}
                rows.append(row | {"ratio": times["two_calls"] / times["one_call"]})
    return rows


def _ways(inference: Inference, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    composite, null = inference.network.config.composite, inference.network.null_class
    noise, times = initial_noise(range(batch), composite).to(device), torch.full((2,), 0.5, device=device)
    labels = torch.arange(batch, device=device) % null
    nulls = torch.full_like(labels, null)
    strong, weak = velocity_field(inference, labels), velocity_field(inference, nulls)
    return {
        "two_calls": lambda: (strong(noise, times), weak(noise, times)),
        "one_call": partial(pair(inference, labels, nulls), noise, times),
    }
