"""What training XL and XXL on ImageNet 256 takes, from one GPU to 1 024, by arithmetic; docs/scaling.md explains it.

    python benchmarks/scaling.py [--mfu 0.3] [--link 25e9] [--per-gpu 64] ...

Every number that goes in is a field of `Assumptions`, and a flag. Plain Python, no packages. Times count products,
bytes over links and bytes of optimiser state; latency, launches, evaluation and a slow file system come on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple


class Size(NamedTuple):
    """As in sfd.models.dit.SIZES."""

    depth: int
    width: int
    heads: int


SIZES = {"XL": Size(28, 1152, 16), "XXL": Size(24, 1536, 24)}
STEPS_80_EPOCHS = 400_000  # published, at batch 256


@dataclass(frozen=True)
class Assumptions:
    """All inputs. Bytes, operations and seconds, not their multiples."""

    # Published recipe.
    images: int = 1_281_167
    orientations: int = 2
    batch: int = 256
    tokens: int = 256
    channels: int = 48  # texture 32 + semantic 16
    features: int = 768  # channels that REPA aligns with
    repa_width: int = 2048
    classes: int = 1000
    # Stated by vendors: H100 SXM, eight a node; one direction of NVLink 4 and of a 400 Gb/s adapter, each a GPU.
    rate: float = 989e12  # bf16, dense
    memory: float = 80e9
    memory_rate: float = 3.35e12
    node: int = 8
    nvlink: float = 450e9
    link: float = 50e9
    # Assumed.
    mfu: float = 0.4  # share of `rate` that a training step reaches
    link_share: float = 0.7  # share of the links' rates that collectives reach
    grad_bytes: int = 4  # of a gradient on its way; 2: reduced in bf16
    per_gpu: int = 32  # samples a GPU where the batch grows with the GPUs
    # Counted in this project's code (tests/test_scaling.py).
    kept: float = 64.0  # bytes kept for the backward pass, a token, a channel of the width, a block; bf16 autocast
    kept_checkpointed: float = 4.0  # the same when blocks are recomputed: their input, in float32


def parameters(size: Size, a: Assumptions) -> int:
    """Trained parameters, REPA projector included."""
    d, hidden, half = size.width, 8 * size.width // 3, size.width // 2
    block = (4 * d * d + 4 * d) + 2 * d // size.heads + 2 * d + (3 * d * hidden + 2 * hidden + d) + (6 * d * d + 6 * d)
    clocks = 2 * (256 * half + half + half * half + half)
    ends = a.channels * (2 * d + 1) + d + (a.classes + 1) * d + d + 2 * d * d + 2 * d
    r = a.repa_width
    return size.depth * block + clocks + ends + (d * r + r) + (r * r + r) + (r * a.features + a.features)


def forward_flops(size: Size, a: Assumptions) -> int:
    """Operations of one image's forward pass, without the projector: what sfd.models.dit.flops counts."""
    d = size.width
    block = (4 * d + 3 * (8 * d // 3)) * d + 2 * a.tokens * d
    rest = 256 * d + d * d // 2 + (6 * size.depth + 2) * d * d
    return 2 * (a.tokens * (size.depth * block + 2 * d * a.channels) + rest)


def training_flops(size: Size, a: Assumptions) -> int:
    """Operations of one image's training step: forward and backward, the latter twice the former."""
    projector = 2 * a.tokens * a.repa_width * (size.width + a.repa_width + a.features)
    return 3 * (forward_flops(size, a) + projector)


def activations(size: Size, a: Assumptions, checkpointing: bool) -> float:
    """Bytes kept for the backward pass of one image."""
    blocks = a.kept_checkpointed * size.depth + a.kept if checkpointing else a.kept * size.depth
    return a.tokens * size.width * blocks


STRATEGIES = ("DDP", "FSDP", "HSDP")


def state(size: Size, a: Assumptions, strategy: str, gpus: int) -> float:
    """Bytes on one GPU: float32 weights, gradients, two moments and average; and bf16 weights while they are used."""
    count = parameters(size, a)
    if strategy == "DDP" or gpus == 1:
        return (20 + 2) * count  # autocast keeps its bf16 copies from the forward to the backward pass
    shards = gpus if strategy == "FSDP" else min(gpus, a.node)
    return 20 * count / shards + 2 * 2 * count / size.depth  # two blocks are gathered at a time


def communication(size: Size, a: Assumptions, strategy: str, gpus: int) -> float:
    """Seconds of a step's collectives, within nodes and then between them."""
    count, local = parameters(size, a), min(gpus, a.node)
    nodes = gpus / local
    weights, grads = 2 * count, a.grad_bytes * count
    # An all-reduce is a reduce-scatter and an all-gather: (n − 1)/n of the bytes for each.
    whole = 2 * grads if strategy == "DDP" else 2 * weights + grads
    inside = whole * (local - 1) / local / a.nvlink
    across = (2 * grads if strategy == "HSDP" else whole) * (nodes - 1) / nodes / local / a.link
    return (inside + across) / a.link_share


def optimiser(size: Size, a: Assumptions, strategy: str, gpus: int) -> float:
    """Seconds to read weight, gradient, moments and average and to write all but the gradient: nine float32 numbers."""
    shards = {"DDP": 1, "FSDP": gpus, "HSDP": min(gpus, a.node)}[strategy]
    return 36 * parameters(size, a) / shards / a.memory_rate


class Step(NamedTuple):
    """Seconds of one training step, by what takes them."""

    compute: float
    communication: float
    optimiser: float

    @property
    def seconds(self) -> float:
        """Communication hides behind computation as far as that goes; the optimiser waits for both."""
        return max(self.compute, self.communication) + self.optimiser

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def step(size: Size, a: Assumptions, strategy: str, gpus: int, batch: int) -> Step:
    """Predict a step. A sample is not divided, so beyond one a GPU the others have nothing to do."""
    samples = -(-batch // gpus)
    compute = samples * training_flops(size, a) / (a.rate * a.mfu)
    return Step(compute, communication(size, a, strategy, gpus), optimiser(size, a, strategy, gpus))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def disk(a: Assumptions) -> str:
    """Bytes an image and a data set."""
    latent, features = a.channels * a.tokens, a.features * a.tokens
    parts = {"latents, float32": 4 * latent, "latents, float16": 2 * latent, "REPA features, float16": 2 * features}
    count = a.images * a.orientations
    rows = [[name, f"{size / 1e3:.1f} kB", f"{size * count / 1e9:,.0f} GB"] for name, size in parts.items()]
    return table(["", "a sample", f"{count / 1e6:.2f} M samples"], rows)


def reading(a: Assumptions) -> str:
    """Bytes a second, for the images a second that a GPU trains on."""
    latent, features = 4 * a.channels * a.tokens, 2 * a.features * a.tokens
    rows = []
    for name, size in SIZES.items():
        speed = a.rate * a.mfu / training_flops(size, a)
        for what, each in (("latents", latent), ("latents and features", latent + features)):
            rates = (speed * each * gpus / 1e9 for gpus in (1, a.node, 1024))
            rows.append([name, f"{speed:,.0f}", what, *(f"{rate:,.3g} GB/s" for rate in rates)])
    return table(["", "images/s a GPU", "read", "one GPU", f"a node of {a.node}", "1 024 GPUs"], rows)


def memory(a: Assumptions) -> str:
    """Gigabytes on one GPU, and how many samples fit beside the state."""
    rows = []
    for name, size in SIZES.items():
        for strategy, gpus in (("DDP", 1), ("DDP", 8), ("FSDP", 8), ("FSDP", 64), ("HSDP", 64)):
            held = state(size, a, strategy, gpus)
            each = [activations(size, a, checkpointing) for checkpointing in (False, True)]
            fit = [max(0, int((0.9 * a.memory - held) // e)) for e in each]
            label = "one GPU" if gpus == 1 else f"{strategy}, {gpus} GPUs"
            rows.append([name, label, f"{held / 1e9:.1f} GB", *(f"{e / 1e6:.0f} MB" for e in each), *fit])
    head = ["", "strategy", "state", "a sample", "checkpointed", "samples that fit", "checkpointed"]
    return table(head, rows)


def scaling(a: Assumptions, name: str, strategy: str, weak: bool) -> str:
    """Step times from 1 to 1 024 GPUs, at the published batch or at one that grows with the GPUs."""
    size, rows = SIZES[name], []
    alone = a.rate * a.mfu / training_flops(size, a)
    for gpus in (1, 8, 16, 32, 64, 128, 256, 1024):
        batch = a.per_gpu * gpus if weak else a.batch
        taken = step(size, a, strategy, gpus, batch)
        speed = batch / taken.seconds
        times = [f"{1e3 * seconds:.1f}" for seconds in (*taken, taken.seconds)]
        hours = STEPS_80_EPOCHS * a.batch / speed / 3600
        share = f"{speed / (gpus * alone):.0%}"
        rows.append([f"{gpus:,}", f"{batch:,}", f"{batch / gpus:g}", *times, share, f"{hours:,.1f}", taken.limit])
    head = ["GPUs", "batch", "samples a GPU", "compute, ms", "communication", "optimiser", "step", "efficiency"]
    return table([*head, "hours for 80 epochs", "limit"], rows)


def crossover(a: Assumptions) -> str:
    """Samples a GPU at which computing takes as long as communicating, over many nodes."""
    rows = []
    for name, size in SIZES.items():
        each = training_flops(size, a) / (a.rate * a.mfu)
        rows.append([name, *(f"{communication(size, a, s, 1024) / each:.1f}" for s in STRATEGIES)])
    return table(["", *STRATEGIES], rows)


def report(a: Assumptions) -> dict[str, str]:
    """Every table, by its title."""
    sizes = [
        [
            name,
            f"{parameters(s, a) / 1e6:,.1f} M",
            f"{forward_flops(s, a) / 1e9:.1f}",
            f"{training_flops(s, a) / 1e9:,.0f}",
        ]
        for name, s in SIZES.items()
    ]
    return {
        "Sizes": table(["", "parameters with projector", "GFLOP forward", "GFLOP in training"], sizes),
        "On disk": disk(a),
        "Reading": reading(a),
        "Memory": memory(a),
        "Strong scaling, XL, DDP": scaling(a, "XL", "DDP", weak=False),
        "Strong scaling, XXL, HSDP": scaling(a, "XXL", "HSDP", weak=False),
        "Weak scaling, XL, DDP": scaling(a, "XL", "DDP", weak=True),
        "Samples a GPU below which communication limits": crossover(a),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Assumptions):
        flag, kind = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(flag, type=kind, default=field.default, metavar=f"{field.default:g}")
    for title, rows in report(Assumptions(**vars(parser.parse_args()))).items():
        print(f"{title}\n\n{rows}\n")


if __name__ == "__main__":
    main()
