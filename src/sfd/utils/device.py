"""How long a piece of work takes and how much memory it needs, measured while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from sfd.utils.errors import SFDError

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass
class Usage:
    """Filled in when the block of `measured` ends."""

    started: float
    """On the monotonic clock."""
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """The largest resident memory of the process that was seen."""
    peak_device_memory_bytes: int = 0
    """The largest memory that PyTorch held on a CUDA device; 0 elsewhere."""

    def so_far(self) -> float:
        """Seconds since the block began."""
        return time.monotonic() - self.started

    def record(self) -> dict[str, float]:
        """Give what was measured, as plain values."""
        return {
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_device_memory_bytes": self.peak_device_memory_bytes,
        }


@contextmanager
def measured(device: torch.device) -> Iterator[Usage]:
    """Measure the block, looking at the process's memory a few times a second."""
    usage, done = Usage(time.monotonic()), threading.Event()
    process = psutil.Process()

    def watch() -> None:
        while True:
            usage.peak_memory_bytes = max(usage.peak_memory_bytes, process.memory_info().rss)
            if done.wait(SECONDS_BETWEEN_LOOKS):
                return

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield usage
    finally:
        usage.seconds = usage.so_far()
        done.set()
        watcher.join()
        if device.type == "cuda":
            usage.peak_device_memory_bytes = torch.cuda.max_memory_allocated(device)


def slow_bf16(device: torch.device) -> str | None:
    """Say why bf16 is slower than float32 on a device, or not known to be any good there; None: it is neither."""
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        if not any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            return "this CPU has no bf16 instructions, so bf16 takes longer here than float32"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bf16 units, so bf16 takes longer here than float32"
    if device.type == "mps":
        return "bf16 is untried on Apple's GPUs; float32 is the safe choice here"
    return None


def choose_device(name: str) -> torch.device:
    """Find the device of a name: "auto" is CUDA, else Apple's MPS, else the CPU.

    From then on float32 is float32: of its own accord PyTorch rounds the factors of convolutions on GPUs to TF32.

    Raises:
        SFDError: the device is not there.
    """
    torch.backends.cudnn.allow_tf32 = False
    present = _present()
    if name == "auto":
        return torch.device(present[-1])
    reason = _absent(name)
    if reason is None:
        device = torch.device(name)
        try:
            torch.zeros(1, device=device).item()  # computes there: a GPU may be seen that this PyTorch has no code for
            if device.type == "cuda" and device.index is not None:
                # So that everything that asks for "the" GPU gets this one, accelerate among it.
                torch.cuda.set_device(device)
            return device
        except (RuntimeError, AssertionError, ImportError) as error:
            # What it says of other kinds names its own parts, and nothing that a user could change.
            said = f": {str(error).splitlines()[0].split('. ')[0]}" if device.type == "cuda" else ""
            reason = f"PyTorch cannot compute on it{said}"
    raise SFDError(
        f"there is no device {name!r} here ({reason}); use {', '.join(['auto', *present[:-1]])} or {present[-1]}"
    )


def _present() -> list[str]:
    """Name the kinds of device that are there, the one that is wanted most last."""
    apple, nvidia = torch.backends.mps.is_available(), torch.cuda.is_available()
    return ["cpu", *["mps"] * apple, *["cuda"] * nvidia]


def _absent(name: str) -> str | None:
    """Say why this machine has no device of a name; None: it may have one."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return "that is no device's name"
    if device.type == "cpu" and name not in ("cpu", "cpu:0"):
        return "the CPU is a single device, and has no number"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU" if torch.backends.cuda.is_built() else "this PyTorch is built without CUDA"
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"GPUs are numbered from 0, and PyTorch sees {torch.cuda.device_count()}"
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "PyTorch sees no GPU of Apple's"
    return None
