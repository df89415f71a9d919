"""The network as sampling calls it: no gradients, bf16 weights cast once, one compiled graph where that pays."""

from __future__ import annotations

import copy
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sfd.models.dit import LightningDiT
from sfd.utils.errors import SFDError
from sfd.utils.transfer import sent

Precision = Literal["float32", "bf16"]
Compile = Literal["auto", "on", "off"]

# Operations (2 a multiply-add) from which on the time that compiled code saves is longer than compiling takes: one to
# two minutes for the published sizes, against a tenth to a fifth of the time on a CPU and more on a GPU.
COMPILING_PAYS = {"cpu": 2e14, "cuda": 3e16}


class Inference:
    """v̂(x, t, y) of a transformer, as it was when this was made."""

    def __init__(self, network: LightningDiT, precision: Precision = "float32", *, compiled: bool = False) -> None:
        """Prepare a network for sampling.

        Args:
            network: where it shall be used; its weights float32.
            precision: bf16 casts the weights of the blocks' matrix products, in a copy. Norms, softmax, times, the
                residual stream, patch embeddings and output heads stay float32.
            compiled: compile it at the first call, into one graph for all batch sizes.

        Raises:
            SFDError: compiled, but this machine cannot.
        """
        device = network.position.device
        if compiled:
            require_compiler(device)
        self.network = in_bf16(network) if precision == "bf16" else network
        self._compiled = compiled
        self._forward = torch.compile(self.network, fullgraph=True) if compiled else self.network

    @torch.no_grad()
    def __call__(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Give the velocity (B, N), float32, of x (B, N) at times (K,) or (B, K), for labels (B,)."""
        times = sent(times.to(x.dtype), x.device).expand(len(x), -1)
        if not self._compiled:
            velocity: Tensor = self._forward(x, times, labels).velocity
            return velocity
        # A graph for any batch size is not one for a single image, which torch compiles apart; so there are two.
        arguments = [a.expand(max(len(x), 2), *a.shape[1:]).contiguous() for a in (x, times, labels)]
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, 0)
        # Frozen, weights are constants that are packed once in the way that a CPU's matrix products read them.
        with torch._inductor.config.patch(freezing=x.device.type == "cpu"):
            return self._forward(*arguments).velocity[: len(x)]


def in_bf16(network: LightningDiT) -> LightningDiT:
    """Copy a network for evaluation, the weights of its blocks' matrix products in bf16."""
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    for module in copied.blocks.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return copied


def compiling_pays(operations: float, device: torch.device) -> bool:
    """Tell whether compiling takes less time than it saves over so many operations."""
    return operations >= COMPILING_PAYS.get(device.type, float("inf")) and cannot_compile(device) is None


def require_compiler(device: torch.device) -> None:
    """Refuse to compile where it is not possible.

    Raises:
        SFDError: says why.
    """
    reason = cannot_compile(device)
    if reason is not None:
        raise SFDError(
            f"networks cannot be compiled here: {reason}; mend that, or do without: "
            "`--compile off` for `sfd sample`, `compile: false` in a recipe"
        )


def cannot_compile(device: torch.device) -> str | None:
    """Say why networks cannot be compiled for a device here; None: they can."""
    if not _found("CXX", "g++", "clang++", "cl"):
        return "there is no C++ compiler (g++ or clang++, or another one named by the environment variable CXX)"
    # Compiled code is loaded as a module of Python's.
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's header files are missing (on Debian and Ubuntu they are the package python3-dev)"
    if device.type == "cuda":
        if not _found("CC", "gcc", "clang"):
            return "there is no C compiler (gcc or clang, or another one named by the environment variable CC)"
        from torch.utils._triton import has_triton

        if not has_triton():
            return "the package triton is missing, or does not know this GPU"
    return None


def _found(variable: str, *names: str) -> bool:
    """Whether there is a program: the one that an environment variable names, or one of these."""
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)
