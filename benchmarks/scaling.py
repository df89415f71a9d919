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
from sfd.models.dit import parameter_count
from sfd.models.dit_config import DiTConfig, flops
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


def state(name: str) -> int:
    """Bytes on one GPU: float32 weights, gradients, two moments and EMA; and autocast's bf16 copies of the weights."""
    return (20 + 2) * parameter_count(network(name))


def communication(name: str, a: Assumptions, gpus: int) -> float:
    """Seconds of a step's all-reduce, within nodes and then between them."""
    local = min(gpus, a.node)
    nodes = gpus / local
    whole = 2 * a.grad_bytes * parameter_count(network(name))  # a reduce-scatter and an all-gather
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


def step(name: str, a: Assumptions, gpus: int, batch: int) -> Step:
    """Predict a step. A sample is not divided, so beyond one per GPU the others idle."""
    compute = -(-batch // gpus) * training_flops(name) / (a.rate * a.mfu)
    # The optimizer reads weight, gradient, moments and EMA and writes all but the gradient: nine float32 numbers.
    optimizer = 36 * parameter_count(network(name)) / a.memory_rate
    return Step(compute, communication(name, a, gpus), optimizer)


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
        row: Row = {"": name, "state": f"{state(name) / 1e9:.1f} GB"}
        for label, checkpointing in (("", False), (", checkpointed", True)):
            each = kept_bytes(network(name, checkpointing), "bf16")
            row[f"a sample{label}"] = f"{each / 1e6:.0f} MB"
            row[f"samples that fit{label}"] = max(0, int((0.9 * a.memory - state(name)) // each))
        rows.append(row)
    return rows


def _scaling(a: Assumptions, weak: bool, name: str = "XL") -> list[Row]:
    rows = []
    alone = a.rate * a.mfu / training_flops(name)
    for gpus in (1, 8, 16, 32, 64, 256, 1024):
        batch = a.per_gpu * gpus if weak else a.batch
        taken = step(name, a, gpus, batch)
        speed = batch / taken.seconds
        row: Row = {"GPUs": f"{gpus:,}", "batch": f"{batch:,}", "samples per GPU": f"{batch / gpus:g}"}
        row |= {f"{part}, ms": f"{1e3 * seconds:.1f}" for part, seconds in taken._asdict().items()}
        row |= {"step, ms": f"{1e3 * taken.seconds:.1f}", "efficiency": f"{speed / (gpus * alone):.0%}"}
        row["hours for 80 epochs"] = f"{STEPS_80_EPOCHS * a.batch / speed / 3600:,.1f}"
        rows.append(row | {"limit": taken.limit})
    return rows


def crossover(a: Assumptions) -> list[Row]:
    """Samples per GPU at which computing takes as long as communicating, over many nodes."""
    each = {name: training_flops(name) / (a.rate * a.mfu) for name in SIZES}
    return [{name: f"{communication(name, a, 1024) / each[name]:.1f}" for name in SIZES}]


TABLES = {
    "sizes": sizes,
    "disk": disk,
    "reading": reading,
    "memory": memory,
    "strong": lambda a: _scaling(a, weak=False),
    "weak": lambda a: _scaling(a, weak=True),
    "crossover": crossover,
}


def rows(table: str, setting: Setting) -> list[Row]:
    """One table, under the assumptions of the command line."""
    return TABLES[table](assumptions(setting.overrides))
