"""Devices: choosing one, copying to it, what it cannot do well, and how much memory was used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sfd.utils.errors import SFDError

# Device types to which copies may be asynchronous. Not Apple's: it may read memory that is in other use by then
# (https://github.com/pytorch/pytorch/issues/139550).
NON_BLOCKING = {"cuda"}


def choose_device(name: str | torch.device) -> torch.device:
    """Choose a device by name ("auto", "cpu", "cuda", "cuda:1", "mps") and compute on it once; "auto" prefers a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a GPU may be listed that this build of PyTorch has no code for
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise SFDError(f"the device {str(name)!r} cannot be used ({reason}); use auto, cpu, cuda or mps") from None
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; to a GPU without synchronising (pinned memory, non-blocking)."""
    if device.type in NON_BLOCKING and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute convolutions in float32 inside the block; on GPUs PyTorch rounds their factors to TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def slow_bf16(device: torch.device) -> str | None:
    """Say why bf16 is slower than float32 on a device, or untested there; None where it is neither."""
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        if not any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            return "this CPU has no bf16 instructions, so bf16 takes longer here than float32"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bf16 units, so bf16 takes longer here than float32"
    if device.type == "mps":
        return "bf16 is untried on Apple's GPUs; float32 is the safe choice here"
    return None


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure anew what `peak_memory` gives for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory of this process since it started, and on a CUDA device since `reset_peak_memory`, in bytes."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"peak_memory_bytes": _process_memory(), "peak_device_memory_bytes": on_device}


def _process_memory() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
