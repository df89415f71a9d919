"""How long a piece of work takes and how much memory it needs, measured while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass
class Usage:
    """Filled in when the block of `measured` ends."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """The largest resident memory of the process that was seen."""
    peak_device_memory_bytes: int = 0
    """The largest memory that PyTorch held on a CUDA device; 0 elsewhere."""


@contextmanager
def measured(device: torch.device) -> Iterator[Usage]:
    """Measure the block, looking at the process's memory a few times a second."""
    usage, done = Usage(), threading.Event()
    process = psutil.Process()

    def watch() -> None:
        while True:
            usage.peak_memory_bytes = max(usage.peak_memory_bytes, process.memory_info().rss)
            if done.wait(SECONDS_BETWEEN_LOOKS):
                return

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watcher = threading.Thread(target=watch, daemon=True)
    start = time.monotonic()
    watcher.start()
    try:
        yield usage
    finally:
        usage.seconds = time.monotonic() - start
        done.set()
        watcher.join()
        if device.type == "cuda":
            usage.peak_device_memory_bytes = torch.cuda.max_memory_allocated(device)


def choose_device(name: str) -> torch.device:
    """Find the device of a name: "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises:
        SFDError: the device is not there.
    """
    from sfd.errors import SFDError

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SFDError(f"there is no device {name!r} here ({reason}); use auto, cpu, cuda or mps") from None
    return device
