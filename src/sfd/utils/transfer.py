"""Tensors on their way from the CPU to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor

# Device types to which a copy may be left under way. Apple's is not among them: it may read memory that is used for
# something else by then (https://github.com/pytorch/pytorch/issues/139550).
ASYNCHRONOUS = {"cuda"}


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; a GPU is not waited for, so that the CPU stays ahead of what it has yet to compute.

    A plain `.to` waits until the GPU has done all that was asked of it, as does `torch.tensor(…, device="cuda")`. Only
    from pinned memory is a copy sure not to.
    """
    if device.type in ASYNCHRONOUS and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
