"""Graph breaks of compiled networks: sampling, training and decoding as one graph each, against eager calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import COMPOSITE, MODEL, Row, Setting, class_labels, frozen, network
from sfd.encoders import kl
from sfd.generation.model import load_model
from sfd.sampling import initial_noise


def graphs(setting: Setting) -> list[Row]:
    """Graph breaks, and the relative difference to the eager call; a quick run generates no code."""
    device, (size, batch) = setting.device, setting.sizes[0]
    x, times = initial_noise(range(batch), COMPOSITE).to(device), torch.full((batch, 2), 0.5, device=device)
    labels, sampled, trained = class_labels(batch, device), frozen(size, device), network(size).to(device).train()
    decoder = load_model(MODEL, device).texture if setting.quick else kl.PublishedAutoencoder(kl.Config()).to(device)
    shape = (batch, 16, 4, 4) if setting.quick else (batch, 32, 16, 16)
    latents = torch.randn(shape, device=device)
    ways: dict[str, Callable[[], Tensor]] = {
        f"{size}, velocity": lambda: sampled(x, times, labels).velocity,
        f"{size}, loss": lambda: trained(x, times, labels).velocity.square().mean(),
        "decoder": lambda: decoder.eval().decode(latents),
    }
    return [{"what": what} | _compared(way, setting) for what, way in ways.items()]


def _compared(way: Callable[[], Tensor], setting: Setting) -> Row:
    torch._dynamo.reset()
    found = torch._dynamo.explain(way)()
    row: Row = {"graphs": found.graph_count, "graph_breaks": found.graph_break_count}
    if setting.compiles:
        compiled = torch.compile(way, backend="aot_eager" if setting.quick else "inductor")
        expected = way().detach()
        row["error"] = ((compiled().detach() - expected).norm() / expected.norm()).item()
    return row
