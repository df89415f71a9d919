"""Training: images per second of whole steps, and their share of the rate of bare matrix products.

`published` is the published step written down plainly, in bf16 and not compiled: norms, modulation and rotary embedding
operation by operation, AdamW as PyTorch has it by default, an EMA weight by weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import COMPOSITE, Row, Setting, best_times, class_labels, network, now, peak
from sfd import flow
from sfd.models.dit import DiTOutput, LightningDiT
from sfd.models.dit_config import flops
from sfd.models.kernels import EPSILON
from sfd.models.layers import Block


class TrainingStep:
    """A training step on random latents: the plain way (`float32`, `published`) or the project's."""

    def __init__(self, net: LightningDiT, batch: int, device: torch.device, way: str) -> None:
        self.device, self.bf16 = device, way.startswith(("bf16", "published"))
        self.plain = way in ("float32", "published")
        self.network = copy.deepcopy(net).to(device).train()
        if way.endswith("recomputed"):
            self.network.config = net.config.model_copy(update={"checkpointing": True})
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.model: Callable[..., DiTOutput] = self.network
        if way.endswith("compiled"):
            self.model = torch.compile(self.network, fullgraph=True)
        if way == "published":
            self.model = partial(plain_forward, self.network)
        how = {} if way == "published" else {"fused": not self.plain, "foreach": False}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, **how)
        self.x, self.target = torch.randn(2, batch, COMPOSITE.size, device=device)
        self.times = torch.rand(batch, 2, device=device)
        self.labels = class_labels(batch, device)
        self.weights = COMPOSITE.per_entry(torch.tensor([s.weight for s in COMPOSITE.streams], device=device))

    def cut(self, batch: int) -> None:
        """Use smaller batches from now on."""
        for name in ("x", "target", "times", "labels"):
            setattr(self, name, getattr(self, name)[:batch])

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            velocity = self.model(self.x, self.times, self.labels).velocity
            loss = flow.velocity_loss(velocity, self.target, self.weights).mean()
            loss = loss + flow.cosine_loss(COMPOSITE.per_position(velocity), COMPOSITE.per_position(self.target)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            pair = list(self.ema.parameters()), list(self.network.parameters())
            if self.plain:
                for average, weight in zip(*pair, strict=True):
                    average.lerp_(weight, 1e-4)
            else:
                torch._foreach_lerp_(*pair, 1e-4)


def plain_forward(net: LightningDiT, x: Tensor, times: Tensor, labels: Tensor) -> DiTOutput:
    """The velocity of a network by its formulas, one operation at a time."""
    tokens, condition = net.embed(x), net.condition(times, labels)
    cosine, sine = (part[:, 0, 0] for part in net.rope.unbind(-1))  # (T, D/2)
    for block in net.blocks:
        tokens = _plain_block(block, tokens, condition, cosine, sine)
    shift, scale = net.final_modulation(condition)[:, None].chunk(2, dim=-1)
    tokens = _plain_norm(tokens, net.final_norm.weight) * (1 + scale) + shift
    return DiTOutput(torch.cat([head(tokens).mT.flatten(1) for head in net.heads], dim=1).float(), None)


def _plain_block(block: Block, x: Tensor, condition: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(condition)[:, None].chunk(6, dim=-1)
    attention = block.attention
    h = _plain_norm(x, block.attention_norm.weight) * (1 + scale_a) + shift_a
    q, k, v = attention.qkv(h).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = (_plain_rope(_plain_norm(y, w[0]), cosine, sine) for y, w in zip((q, k), attention.qk_weight, strict=True))
    attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    x = x + gate_a * attention.out(attended.transpose(1, 2).flatten(2))
    h = _plain_norm(x, block.mlp_norm.weight) * (1 + scale_m) + shift_m
    a, b = block.mlp.w12(h).chunk(2, dim=-1)
    return x + gate_m * block.mlp.w3(F.silu(a) * b)


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def _plain_rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)


def ways(setting: Setting) -> list[str]:
    """The ways to train that this machine can measure."""
    return ["float32", "bf16"] + (["bf16 compiled"] if setting.compiles else [])


def training(setting: Setting) -> Iterator[Row]:
    """Images per second of whole steps, and the share of the rate of a matrix product in the same precision."""
    device, plain = setting.device, {}
    groups = [["published", *ways(setting)]]
    if device.type == "cuda":
        # Each by itself: three trainings of XXL are more than a GPU's memory holds. What takes long comes last.
        groups = [["float32"], ["published"], ["bf16"], ["bf16 recomputed"], ["bf16 compiled"]]
    for group in groups:
        for size, batch in setting.sizes:
            with device:
                net = network(size)
            peak(device)
            steps = {name: TrainingStep(net, batch, device, name) for name in group}
            if device.type == "cuda":
                net.to("meta")
            times = best_times(steps, setting.repeats, device)
            plain.setdefault((size, batch), times.get("float32"))
            torch._dynamo.reset()
            for name, seconds in times.items():
                rate = 3 * flops(net.config) * batch / seconds
                row = {"size": size, "batch": batch, "way": name, "images_per_second": batch / seconds}
                row |= {"ratio": plain[size, batch] / seconds, "flops_per_second": rate}
                precision = "float32" if name == "float32" else "bf16"
                yield row | {"share_of_matrix_rate": rate / setting.matrix_rates[precision]} | peak(device)
            del steps


def compiling(setting: Setting) -> Iterator[Row]:
    """Seconds of a first step, which compiles; the network then is in the compiler's cache."""
    for size, batch in setting.sizes:
        with setting.device:
            step = TrainingStep(network(size), batch, setting.device, "bf16 compiled")
        start = now(setting.device)
        step()
        yield {"size": size, "batch": batch, "first_step_seconds": now(setting.device) - start}
        torch._dynamo.reset()
