"""What every section measures with: networks, turns, memory, and the machine's own rates."""

from __future__ import annotations

import ctypes
import datetime
import gc
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from sfd.schedules import build_schedule
from torch import nn

from sfd.latents import CompositeLatent, Stream
from sfd.models.dit import SIZES, DiTConfig, LightningDiT

ROOT = Path(__file__).parent.parent.parent
COMPOSITE = CompositeLatent(
    streams=(Stream(name="texture", channels=32, grid=16), Stream(name="semantic", channels=16, grid=16, weight=2.0))
)
SCHEDULE = build_schedule({"name": "offset", "delta": 0.3}, COMPOSITE.names)
CLASSES = 1000
Row = dict[str, Any]
Checkpointing = bool | Literal["selective"]
PROCESS = Path("/proc/self")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@dataclass(frozen=True)
class Setting:
    """What the command was asked for; every section is a function of it."""

    device: torch.device
    quick: bool
    repeats: int  # turns, of which the best counts
    out: Path  # a folder for what sections write
    asked: tuple[tuple[str, int], ...] = ()

    @property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        """Networks' sizes and batches: those asked for, or the device's."""
        if self.asked:
            return self.asked
        if self.device.type == "cuda":
            return ("B", 64), ("XL", 64), ("XXL", 64)
        return (("S", 4),) if self.quick else (("S", 8), ("B", 8))

    @cached_property
    def matrix_rates(self) -> dict[str, float]:
        """Operations a second of bare matrix products, by precision."""
        side = 8192 if self.device.type == "cuda" else 2048
        ways: dict[str, Callable[[], Any]] = {}
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            ways[name] = partial(torch.matmul, a, b.T)
        return {name: 2 * side**3 / seconds for name, seconds in best_times(ways, 10, self.device).items()}


def network(size: str, checkpointing: Checkpointing = False) -> LightningDiT:
    """A network as published, none of its weights zero."""
    depth, width, heads = SIZES[size]
    config = DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        composite=COMPOSITE,
        num_classes=CLASSES,
        clocks=("semantic", "texture"),
        checkpointing=checkpointing,
    )
    made = LightningDiT(config)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return made


def class_labels(count: int, device: torch.device) -> torch.Tensor:
    """Give a label an image, (count,), each of the published 1 000 classes in turn."""
    return torch.arange(count, device=device) % CLASSES


def best_times(ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each way, the best of several turns; a first turn, not counted, compiles and warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            wait(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: min(each) for name, each in times.items()}


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def machine(device: torch.device) -> Row:
    """What figures were measured on; for an NVIDIA GPU with the versions of CUDA and cuDNN that PyTorch brings."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "mps":
        name = f"{name}, Apple's MPS"
    row = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return row | {"python": platform.python_version(), "date": datetime.date.today().isoformat()}


def working_memory(way: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of a call in bytes, less what was in use before it; None where the platform cannot tell.

    On a GPU it is that of torch's allocator. On Linux with glibc it is the process's resident memory, while the library
    is told to give back at once what is freed, as far as it is 256 KiB or more: what it keeps otherwise depends on all
    that was called before.
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
        (PROCESS / "clear_refs").write_text("5")  # the peak is from now on
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
    found = re.search(rf"^{name}:\s+(\d+) kB$", (PROCESS / "status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
