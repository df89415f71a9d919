"""Attention by itself: what `sfd.models.layers` chooses between on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, Setting, best_times

SHAPES = ((256, 4, 16, 32), (64, 6, 64, 64), (16, 6, 256, 64))  # batch, heads, tokens, channels per head


def fused_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def fused_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())


def products_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q.bfloat16() @ k.bfloat16().mT).float() * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1).bfloat16() @ v.bfloat16()


def attention(setting: Setting) -> list[Row]:
    """Milliseconds of the fused kernel, and of two products with a float32 softmax between them."""
    rows = []
    for shape in SHAPES:
        inputs = tuple(torch.randn(shape, device=setting.device, requires_grad=True) for _ in range(3))
        for what, run in (("forward", _forward), ("forward and backward", _both)):
            ways = {each.__name__: partial(run, each, *inputs) for each in (fused_float32, fused_bf16, products_bf16)}
            times = best_times(ways, 3 * setting.repeats, setting.device)
            row = {"tokens": shape[2], "heads": shape[1], "batch": shape[0], "what": what}
            rows.append(row | {name: 1e3 * seconds for name, seconds in times.items()})
    return rows


@torch.no_grad()
def _forward(attend: Callable[..., Tensor], *inputs: Tensor) -> None:
    attend(*inputs)


def _both(attend: Callable[..., Tensor], *inputs: Tensor) -> None:
    attend(*inputs).float().sum().backward()
