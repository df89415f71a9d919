"""Writes reference cases of any size from a network of ours: what `sfd verify` is given, computed in another way.

Velocities come from the network; guidance, losses and Euler samples are written out here as formulas, so that
`sfd verify` is not compared with itself.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sfd.convert import transformer as published
from sfd.models.dit import LightningDiT

CONFIG = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "input_size": 4,
    "patch_size": 1,
    "in_channels": 7,
    "num_classes": 5,
    "class_dropout_prob": 0.1,
    "use_qknorm": True,
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
    "wo_shift": False,
    "use_repa": True,
    "repa_dino_version": "dinov2_vits14_reg",
    "repa_depth": 1,
    "repa_projector_dim": 16,
    "semantic_chans": 3,
    "semfirst_delta_t": 0.3,
}


def random_network(config: dict[str, Any], seed: int) -> LightningDiT:
    network = LightningDiT(published.published_config(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def write_transformer(
    folder: Path, name: str, *, guide: bool = True, euler: tuple[int, float] | None = (6, 0.5), **changes: Any
) -> None:
    """Write NAME.json, NAME.io, NAME.weights and perhaps NAME.guide_weights."""
    config = CONFIG | changes
    about: dict[str, Any] = {"config": config, "cfg_scale": 2.5}
    network = random_network(config, 0)
    io = _inputs(config) | {"y": torch.tensor([0, config["num_classes"] - 1])}
    times = torch.stack([io["t_texture"], io["t_semantic"]], dim=1)
    composite = network.config.composite
    streams = len(composite.streams)

    def velocity(x: Tensor, times: Tensor, labels: Tensor, network: LightningDiT = network) -> Tensor:
        return network(x.flatten(1), times[:, :streams], labels).velocity.view(x.shape).detach()

    strong = io["velocity"] = velocity(io["x"], times, io["y"])
    if config["class_dropout_prob"]:
        weak = velocity(io["x"], times, torch.full_like(io["y"], config["num_classes"]))
        io["velocity_cfg"] = weak + 2.5 * (strong - weak)
    if guide:
        about |= {"guide_config": config | {"depth": 1, "hidden_size": 16, "num_heads": 1}, "autoguidance_scale": 1.25}
        small = random_network(about["guide_config"], 1)
        _save_weights(small, about["guide_config"], folder / f"{name}.guide_weights.safetensors")
        weak = velocity(io["x"], times, io["y"], small)
        io["velocity_autoguided"] = weak + 1.25 * (strong - weak)
        scales = torch.full((config["in_channels"], 1, 1), 1.5)
        scales[config["in_channels"] - config["semantic_chans"] :] = 2.0
        io["velocity_autoguided_sem2_tex1p5"] = weak + scales * (strong - weak)
    _add_losses(io, network, config)
    if euler:
        points, shift = euler
        about["sampler"] = {"euler_time_points": points, "dopri5": {"rtol": 1e-6, "atol": 1e-7}}
        io[f"sample_euler_shift{shift}"] = _euler(io, velocity, config, points, shift)
    if not config["semfirst_delta_t"]:
        del io["t_semantic"]
    (folder / f"{name}.json").write_text(json.dumps(about))
    save_file({key: value.contiguous() for key, value in io.items()}, folder / f"{name}.io.safetensors")
    _save_weights(network, config, folder / f"{name}.weights.safetensors")


def _inputs(config: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (2, config["in_channels"], config["input_size"], config["input_size"])
    io = {key: torch.randn(shape, generator=generator) for key in ("x", "loss_x1", "loss_x0", "noise")}
    io |= {key: torch.rand(2, generator=generator) for key in ("t_texture", "t_semantic", "loss_base_time")}
    if not config["semfirst_delta_t"]:
        io["t_semantic"] = io["t_texture"]
    grid = config["input_size"] // config["patch_size"]
    if config["use_repa"]:
        io["loss_features"] = torch.randn(2, 384, grid, grid, generator=generator)
    return io


def _save_weights(network: LightningDiT, config: dict[str, Any], path: Path) -> None:
    state = published.to_published(network.state_dict(), network.config)
    if not config["class_dropout_prob"]:
        state[published.LABELS] = state[published.LABELS][:-1]
    save_file({key: value.contiguous() for key, value in state.items()}, path)


def _add_losses(io: dict[str, Tensor], network: LightningDiT, config: dict[str, Any]) -> None:
    delta, semantic = config["semfirst_delta_t"], config["semantic_chans"]
    u, x1, x0 = io["loss_base_time"], io["loss_x1"], io["loss_x0"]
    times = torch.stack([((1 + delta) * u - delta).clamp(min=0), ((1 + delta) * u).clamp(max=1)], dim=1)
    is_semantic = torch.arange(config["in_channels"]) >= config["in_channels"] - semantic
    t = torch.where(is_semantic, times[:, 1:], times[:, :1])[:, :, None, None]
    streams = len(network.config.composite.streams)
    noised = (t * x1 + (1 - t) * x0).flatten(1)
    output = network(noised, times[:, :streams], io["y"], project=config["use_repa"])
    difference = output.velocity.view(x1.shape) - (x1 - x0)
    weights = torch.where(is_semantic, 2.0, 1.0)[:, None, None]
    losses = {
        "loss_velocity": (weights * difference**2).mean((1, 2, 3)),
        "loss_cosine": 1 - cosine_similarity(output.velocity.view(x1.shape), x1 - x0, dim=1).mean((1, 2)),
    }
    if config["use_repa"]:
        features = io["loss_features"].flatten(2).transpose(1, 2)
        losses["loss_repa"] = 1 - cosine_similarity(output.projection, features, dim=2).mean(1)
    total = sum(loss.mean() for loss in losses.values())
    total.backward()
    io |= {key: value.detach() for key, value in (losses | {"loss_total": total}).items()}
    embeddings = [embedding.weight.grad for embedding in network.embeddings]
    patch = config["patch_size"]
    columns = [e.view(len(e), patch, patch, -1) for e in embeddings]
    io["grad.x_embedder.proj.weight"] = torch.cat(columns, dim=3).permute(0, 3, 1, 2).detach()
    rows = len(network.class_embedding.weight) - (not config["class_dropout_prob"])
    io[f"grad.{published.LABELS}"] = network.class_embedding.weight.grad[:rows]


def _euler(io: dict[str, Tensor], velocity: Any, config: dict[str, Any], points: int, shift: float) -> Tensor:
    """Step over [0, 1 + Δ] in float32: semantics while t ≤ 1, texture from t = Δ on, at each step's start."""
    delta, texture = config["semfirst_delta_t"], config["in_channels"] - config["semantic_chans"]
    t = torch.linspace(0, 1 + delta, points)
    if shift:
        t = (1 + delta) * (shift * (t / (1 + delta)) / (1 + (shift - 1) * (t / (1 + delta))))
    x = io["noise"]
    for now, following in pairwise(t):
        v = velocity(x, torch.stack([(now - delta).clamp(min=0), now.clamp(max=1)]).expand(len(x), 2), io["y"])
        v[:, :texture] *= now >= delta
        v[:, texture:] *= now <= 1
        x = x + (following - now) * v
    return x
