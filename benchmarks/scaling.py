"""What training XL and XXL on ImageNet 256 takes, from one GPU to 1 024, by arithmetic; docs/scaling.md explains it.

    python -m benchmarks scaling [mfu=0.3] [link=25e9] [per_gpu=64] ...

Every number that goes in is a field of `Assumptions`. Parameters, FLOPs and kept bytes are those of `sfd`. Times count
products, bytes over links and bytes of optimizer state; latency, launches, evaluation and a slow file system come on
top.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from benchmarks.measure import Row, Setting, config
from sfd.models.dit import DiTConfig, flops, parameter_count
from sfd.run.estimate import PASSES_PER_STEP, kept_bytes
from sfd.utils.errors import SFDError, unknown

SIZES = ("XL", "XXL")
STEPS_80_EPOCHS = 400_000  # published, at batch 256
FEATURES = 768  # channels that REPA aligns with


@dataclass(frozen=True)
class Assumptions:
    """All inputs. Bytes, operations and seconds, not their multiples."""

    # Published recipe.
    images: int = 1_281_167
    orientations: int = 2
    batch: int = 256
    # Stated by vendors: H100 SXM, eight per node; one direction of NVLink 4 and of a 400 Gb/s adapter, per GPU.
    rate: float = 989e12  # bf16, dense
    memory: float = 80e9
    memory_rate: float = 3.35e12
    node: int = 8
    nvlink: float = 450e9
    link: float = 50e9
    # Assumed.
    mfu: float = 0.4  # share of `rate` that a training step reaches
    link_share: float = 0.7  # share of the links' rates that collectives reach
    grad_bytes: int = 4  # per gradient in transit; 2: reduced in bf16
    per_gpu: int = 32  # samples per GPU where the batch grows with the GPUs


def assumptions(overrides: tuple[str, ...]) -> Assumptions:
    """Read `field=value`."""
    kinds = {field.name: type(field.default) for field in fields(Assumptions)}
    values = {}
    for override in overrides:
        name, _, text = override.partition("=")
        if name not in kinds:
            raise unknown("assumption", name, kinds)
        try:
            values[name] = kinds[name](text)
        except ValueError:
            raise SFDError(f"{override!r} should give a number ({kinds[name].__name__})") from None
    return replace(Assumptions(), **values)


def network(name: str, checkpointing: bool = False) -> DiTConfig:
    """The published network, with REPA's projector."""
    return config(name, checkpointing, repa_block=2, repa_channels=FEATURES)


def training_flops(name: str) -> int:
    """Operations of one image's training step."""
    return PASSES_PER_STEP * flops(network(name), training=True)


def state(name: str, strategy: str, gpus: int) -> float:
    """Bytes on one GPU: float32 weights, gradients, two moments and EMA; and bf16 weights while they are used."""
    count = parameter_count(network(name))
    if strategy == "DDP" or gpus == 1:
        return (20 + 2) * count  # autocast keeps its bf16 copies from the forward to the backward pass
    return 20 * count / gpus + 2 * 2 * count / network(name).depth  # two blocks are gathered at a time


def communication(name: str, a: Assumptions, strategy: str, gpus: int) -> float:
    """Seconds of a step's collectives, within nodes and then between them."""
    count, local = parameter_count(network(name)), min(gpus, a.node)
    nodes, grads = gpus / local, a.grad_bytes * count
    # An all-reduce is a reduce-scatter and an all-gather: (n − 1)/n of the bytes for each. FSDP gathers bf16 weights
    # twice and scatters gradients.
    whole = 2 * grads if strategy == "DDP" else 2 * 2 * count + grads
    inside = whole * (local - 1) / local / a.nvlink
    across = whole * (nodes - 1) / nodes / local / a.link
    return (inside + across) / a.link_share


class Step(NamedTuple):
    """Seconds of one training step, by what takes them."""

    compute: float
    communication: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """Communication hides behind computation as far as that goes; the optimizer waits for both."""
        return max(self.compute, self.communication) + self.optimizer

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def step(name: str, a: Assumptions, strategy: str, gpus: int, batch: int) -> Step:
    """Predict a step. A sample is not divided, so beyond one per GPU the others idle."""
    samples = -(-batch // gpus)
    compute = samples * training_flops(name) / (a.rate * a.mfu)
    # The optimizer reads weight, gradient, moments and EMA and writes all but the gradient: nine float32 numbers.
    optimizer = 36 * parameter_count(network(name)) / (1 if strategy == "DDP" else gpus) / a.memory_rate
    return Step(compute, communication(name, a, strategy, gpus), optimizer)


def sizes(a: Assumptions) -> list[Row]:
    """Parameters with the projector, and operations per image."""
    return [
        {
            "": name,
            "parameters": f"{parameter_count(network(name)) / 1e6:,.1f} M",
            "GFLOP forward": f"{flops(network(name)) / 1e9:.1f}",
            "GFLOP in training": f"{training_flops(name) / 1e9:,.0f}",
        }
        for name in SIZES
    ]


def _sample_bytes() -> dict[str, int]:
    latent = network("XL").composite.size
    tokens = network("XL").composite.token_grid ** 2
    return {
        "latents, float32": 4 * latent,
        "latents, float16": 2 * latent,
        "REPA features, float16": 2 * FEATURES * tokens,
    }


def disk(a: Assumptions) -> list[Row]:
    """Bytes per image and per data set."""
    count = a.images * a.orientations
    total = f"{count / 1e6:.2f} M samples"
    parts = _sample_bytes().items()
    return [{"": name, "a sample": f"{n / 1e3:.1f} kB", total: f"{n * count / 1e9:,.0f} GB"} for name, n in parts]


def reading(a: Assumptions) -> list[Row]:
    """Bytes per second, for the images per second that a GPU trains on."""
    latent, _, features = _sample_bytes().values()
    rows = []
    for name in SIZES:
        speed = a.rate * a.mfu / training_flops(name)
        for what, each in (("latents", latent), ("latents and features", latent + features)):
            row: Row = {"": name, "images/s per GPU": f"{speed:,.0f}", "read": what}
            for gpus in (1, a.node, 1024):
                row[f"{gpus:,} GPU{'s' * (gpus > 1)}"] = f"{speed * each * gpus / 1e9:,.3g} GB/s"
            rows.append(row)
    return rows


def memory(a: Assumptions) -> list[Row]:
    """Gigabytes on one GPU, and how many samples fit; a tenth of the memory stays free."""
    rows = []
    for name in SIZES:
        for strategy, gpus in (("DDP", 1), ("DDP", 8), ("FSDP", 8), ("FSDP", 64)):
            held = state(name, strategy, gpus)
            row: Row = {"": name, "strategy": "one GPU" if gpus == 1 else f"{strategy}, {gpus} GPUs"}
            row["state"] = f"{held / 1e9:.1f} GB"
            for label, checkpointing in (("", False), (", checkpointed", True)):
                each = kept_bytes(network(name, checkpointing), "bf16")
                row[f"a sample{label}"] = f"{each / 1e6:.0f} MB"
                row[f"samples that fit{label}"] = max(0, int((0.9 * a.memory - held) // each))
            rows.append(row)
    return rows


def _scaling(a: Assumptions, name: str, strategy: str, weak: bool) -> list[Row]:
    rows = []
    alone = a.rate * a.mfu / training_flops(name)
    for gpus in (1, 8, 16, 32, 64, 128, 256, 1024):
        batch = a.per_gpu * gpus if weak else a.batch
        taken = step(name, a, strategy, gpus, batch)
        speed = batch / taken.seconds
        row: Row = {"GPUs": f"{gpus:,}", "batch": f"{batch:,}", "samples per GPU": f"{batch / gpus:g}"}
        row |= {f"{part}, ms": f"{1e3 * seconds:.1f}" for part, seconds in taken._asdict().items()}
        row |= {"step, ms": f"{1e3 * taken.seconds:.1f}", "efficiency": f"{speed / (gpus * alone):.0%}"}
        row["hours for 80 epochs"] = f"{STEPS_80_EPOCHS * a.batch / speed / 3600:,.1f}"
        rows.append(row | {"limit": taken.limit})
    return rows


def crossover(a: Assumptions) -> list[Row]:
    """Samples per GPU at which computing takes as long as communicating, over many nodes."""
    rows = []
    for name in SIZES:
        each = training_flops(name) / (a.rate * a.mfu)
        rows.append({"": name} | {s: f"{communication(name, a, s, 1024) / each:.1f}" for s in ("DDP", "FSDP")})
    return rows


TABLES = {
    "sizes": sizes,
    "disk": disk,
    "reading": reading,
    "memory": memory,
    "strong": lambda a: _scaling(a, "XL", "DDP", weak=False),
    "strong_xxl": lambda a: _scaling(a, "XXL", "FSDP", weak=False),
    "weak": lambda a: _scaling(a, "XL", "DDP", weak=True),
    "crossover": crossover,
}


def rows(table: str, setting: Setting) -> list[Row]:
    """One table, under the assumptions of the command line."""
    return TABLES[table](assumptions(setting.overrides))
