"""One training step of a recipe's transformer: images a second, and the share of time in matrix products.

    python benchmarks/train_step.py recipes/shapes-demo.yaml [field=value ...]

Data are random numbers of the right shape; float32 and bf16 are measured in turn, in one run.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sfd import flow
from sfd.config import load_recipe
from sfd.models.transformer import Transformer, flops
from sfd.plan import planned_architecture
from sfd.resources import choose_device

REPEATS = 10
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def main() -> None:
    recipe = load_recipe(Path(sys.argv[1]), sys.argv[2:])
    device = choose_device("auto")
    config, batch = planned_architecture(recipe), recipe.train.batch_size
    network = Transformer(config).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    x, target = torch.randn(2, batch, config.composite.size, device=device)
    times = torch.rand(batch, len(config.composite.streams), device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    weights = torch.ones(config.composite.size, device=device)

    def step(bf16: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, bf16):
            output = network(x, times, labels, project=config.repa_block is not None)
        loss = flow.velocity_loss(output.velocity, target, weights).mean()
        if output.projection is not None:
            loss = loss + output.projection.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for bf16 in (False, True):
        step(bf16)
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            step(bf16)
            taken.append(time.perf_counter() - start)
        seconds = statistics.median(taken)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            step(bf16)
        events = record.key_averages()
        total = sum(e.self_cpu_time_total for e in events)
        share = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / total
        rate = 3 * flops(config) * batch / seconds
        print(
            f"{'bf16' if bf16 else 'float32':7s} {1e3 * seconds:7.1f} ms a step, {batch / seconds:7.0f} images/s, "
            f"{rate / 1e9:6.0f} GFLOP/s, {share:.0%} of the CPU's time in matrix products"
        )


if __name__ == "__main__":
    main()
