"""Attention on this CPU: the fused kernel against two plain products, forward and backward; see `sfd.models.layers`.

    python benchmarks/attention.py

Prints the time of each and its ratio to the fused float32 kernel, by number of tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = [(256, 4, 16, 32), (64, 6, 64, 64), (16, 6, 256, 64)]  # batch, heads, tokens, channels of a head
REPEATS = 15


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def fused_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch = q.shape[:2]
    q, k, v = (x.bfloat16().flatten(0, 1) for x in (q, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)).float() * q.shape[-1] ** -0.5
    return torch.bmm(logits.softmax(dim=-1).bfloat16(), v).unflatten(0, batch)


def milliseconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> float:
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        attend(q, k, v).float().sum().backward()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    for shape in SHAPES:
        base = milliseconds(fused, shape)
        print(f"{shape[2]:4d} tokens: fused float32 {base:6.2f} ms", end="")
        for name, attend in (("fused bf16", fused_bf16), ("products bf16", products)):
            taken = milliseconds(attend, shape)
            print(f"; {name} {taken:6.2f} ms ({taken / base:.2f})", end="")
        print()
