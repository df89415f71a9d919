"""Which of the network's products carry the error that bf16 makes in its velocity."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from benchmarks.speed.measuring import ROOT, Row, Setting
from benchmarks.speed.sampling import trajectory
from sfd.generation.model import load_model
from sfd.models.dit import LightningDiT
from sfd.models.inference import Inference, in_bf16

PRODUCTS = {
    "modulations": "modulation",
    "queries, keys, values": "qkv",
    "attention's output": "out",
    "SwiGLU, in": "w12",
    "SwiGLU, out": "w3",
}
ATTENTION = "attention itself"
OPERANDS = ("weights", "inputs", "outputs")


def error_sources(setting: Setting) -> list[Row]:
    """Relative errors of the demo model's velocity along its trajectories, largest and mean, with a part in bf16."""
    model = load_model(ROOT / "models" / "shapes", setting.device)
    network, every = model.transformer, [*PRODUCTS, ATTENTION]
    labels = torch.arange(64, device=setting.device) % len(model.classes)
    ways = {f"{name} alone": in_part(network, [name]) for name in every}
    ways |= {f"{operand} of all products": rounded(network, operand) for operand in OPERANDS}
    ways |= {"all of these": in_part(network, every)}
    ways |= {f"all but {name}": in_part(network, [n for n in every if n != name]) for name in every}
    ways |= {"all, and what lies between: as in sampling": in_bf16(network)}
    ways |= {"all of these in float16": in_part(network, every, torch.float16)}
    plain = Inference(network)
    visited = [(x, times, plain(x, times, labels)) for x, times in trajectory(model, plain, labels)]
    rows = []
    for name, way in ways.items():
        seen = [(Inference(way)(x, times, labels) - v).norm() / v.norm() for x, times, v in visited]
        rows.append({"in_bf16": name, "largest_error": max(seen).item(), "mean_error": (sum(seen) / len(seen)).item()})
    return rows


def in_part(network: LightningDiT, names: Collection[str], dtype: torch.dtype = torch.bfloat16) -> LightningDiT:
    """Copy a network with these products in another type; what they give is rounded to it, and float32 from there."""
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    chosen = {PRODUCTS[name] for name in names if name in PRODUCTS}
    for name, module in copied.blocks.named_modules():
        if isinstance(module, nn.Linear):
            kind = name.rpartition(".")[2]
            if kind in chosen:
                module.to(dtype)
            # Attention computes in the type of the values that it gets.
            given = dtype if kind == "qkv" and ATTENTION in names else torch.float32
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
            module.register_forward_hook(lambda module, inputs, output, given=given: output.to(given))
    return copied


def rounded(network: LightningDiT, operand: str) -> LightningDiT:
    """Copy a network with an operand of all products of its blocks rounded to bf16, and float32 otherwise."""
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    for module in copied.blocks.modules():
        if isinstance(module, nn.Linear):
            if operand == "weights":
                module.weight.copy_(_round(module.weight))
            elif operand == "inputs":
                module.register_forward_pre_hook(lambda module, inputs: (_round(inputs[0]),))
            else:
                module.register_forward_hook(lambda module, inputs, output: _round(output))
    return copied


def _round(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
