"""What every section measures with: networks, interleaved timing, working memory, and the machine's own rates."""

from __future__ import annotations

import ctypes
import datetime
import gc
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sfd.latents import CompositeLatent, Stream
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import SIZES, DiTConfig
from sfd.models.inference import cannot_compile
from sfd.schedule import build_schedule

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "shapes"
COMPOSITE = CompositeLatent(
    streams=(Stream(name="texture", channels=32, grid=16), Stream(name="semantic", channels=16, grid=16, weight=2.0))
)
SCHEDULE = build_schedule({"name": "offset", "delta": 0.3}, COMPOSITE.names)
CLASSES = 1000
Row = dict[str, Any]
Checkpointing = bool | Literal["selective"]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@dataclass(frozen=True)
class Setting:
    """What the command line asks for; every section is a function of it."""

    device: torch.device
    out: Path  # folder for what sections write
    quick: bool = False
    repeats: int = 6  # timed repetitions, of which the best counts
    given: tuple[tuple[str, int], ...] = ()  # sizes and batches from the command line
    overrides: tuple[str, ...] = ()  # FIELD=VALUE, for sections that take them
    compile: bool = True

    @property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        """Networks' sizes and batches."""
        if self.given:
            return self.given
        if self.device.type == "cuda":
            return ("B", 64), ("XL", 64), ("XXL", 64)
        return (("S", 4),) if self.quick else (("S", 8), ("B", 8))

    @property
    def compiles(self) -> bool:
        """Whether compiled networks are measured too."""
        return self.compile and cannot_compile(self.device) is None

    @cached_property
    def matrix_rates(self) -> dict[str, float]:
        """FLOP/s of bare matrix products, by precision."""
        side = 8192 if self.device.type == "cuda" else 2048
        ways: dict[str, Callable[[], Any]] = {}
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            ways[name] = partial(torch.matmul, a, b.T)
        return {name: 2 * side**3 / seconds for name, seconds in best_times(ways, 10, self.device).items()}


def config(size: str, checkpointing: Checkpointing = False, **fields: Any) -> DiTConfig:
    """A published network's architecture."""
    depth, width, heads = SIZES[size]
    return DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        composite=COMPOSITE,
        num_classes=CLASSES,
        clocks=("semantic", "texture"),
        checkpointing=checkpointing,
        **fields,
    )


def network(size: str, checkpointing: Checkpointing = False, **fields: Any) -> LightningDiT:
    """A network of a published size, with random weights of which none is zero; made on the device of the context."""
    net = LightningDiT(config(size, checkpointing, **fields))
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net


def frozen(size: str, device: torch.device) -> LightningDiT:
    """A network for sampling: in evaluation mode, without gradients."""
    return network(size).eval().requires_grad_(False).to(device)


def class_labels(count: int, device: torch.device) -> torch.Tensor:
    """Labels (count,), each of the 1 000 classes in turn."""
    return torch.arange(count, device=device) % CLASSES


def best_times(ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each way, best of `repeats` interleaved turns (A B A B …); a first turn compiles and warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = now(device)
            way()
            end = now(device)
            if turn:
                times[name].append(end - start)
    return {name: min(each) for name, each in times.items()}


def now(device: torch.device) -> float:
    """Seconds, of all work given to a device; on one thread of a CPU those it computed, without other processes."""
    wait(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def peak(device: torch.device) -> Row:
    """The peak memory of a GPU since the last call, as a column of a table; none elsewhere."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_bytes": found}


def wait(device: torch.device) -> None:
    """Synchronise with a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def machine(device: torch.device) -> Row:
    """What figures are measured on."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    row: Row = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        row |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    elif device.type == "mps":
        row["device"] = f"{name}, Apple's MPS"
    return row | {"python": platform.python_version(), "date": datetime.date.today().isoformat()}


def working_memory(way: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of a call in bytes, less what was in use before it; None where the platform cannot tell.

    On a GPU: that of PyTorch's allocator. On Linux with glibc: the process's resident memory, while the library returns
    at once what is freed in blocks of at least 256 KiB; otherwise what it keeps depends on all earlier calls.
    """
    gc.collect()
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (AttributeError, OSError):  # another C library than glibc, or a container that forbids it
        return None
    library.mallopt(M_MMAP_THRESHOLD, 256 << 10)
    try:
        before = _resident("VmRSS")
        way()
        return _resident("VmHWM") - before
    finally:
        # Where glibc's own thresholds end up in a process that has freed large tensors.
        library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(M_TRIM_THRESHOLD, 64 << 20)


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[0])
