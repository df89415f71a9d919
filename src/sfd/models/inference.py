"""The network as sampling calls it: without gradients, optionally with blocks in bf16 and compiled."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfd.models.dit import DiTOutput, LightningDiT
from sfd.utils.device import to_device
from sfd.utils.errors import SFDError

Precision = Literal["float32", "bf16"]


class Inference:
    """Velocities of a network for given labels, as functions of the state and the streams' times."""

    def __init__(self, network: LightningDiT, precision: Precision = "float32", *, compiled: bool = False) -> None:
        """Prepare a network for sampling.

        Args:
            network: on its final device, with float32 weights.
            precision: bf16 casts the weights of the blocks' matrix products, in a copy. Norms, softmax, times, the
                residual stream, patch embeddings and output heads stay float32.
            compiled: compile it at the first call, which takes a minute or two for the published sizes.
        """
        device = next(network.parameters()).device
        self.network = in_bf16(network) if precision == "bf16" else network
        self._forward: Callable[..., DiTOutput] = self.network
        if compiled:
            require_compiler(device)
            # Frozen weights are packed once in the layout that a CPU's matrix products read.
            options: dict[str, Any] = {"freezing": True} if device.type == "cpu" else {}
            self._forward = torch.compile(self.network, fullgraph=True, dynamic=True, options=options)

    def velocity(self, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """v̂(x, t) for labels (B,): a function of x (B, N) and t (K,) or (B, K), which returns (B, N), float32."""

        return lambda x, t: self._call(x, t, labels).velocity

    def pair(self, labels: Tensor, guiding: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """v̂ for labels (B,) and for guiding labels (B,), in one call of twice the batch; see `velocity`."""
        both = torch.cat([labels, guiding])

        def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            v_c, v_w = self._call(x.repeat(2, 1), _per_image(t, x).repeat(2, 1), both).velocity.chunk(2)
            return v_c, v_w

        return pair

    def inside(self, labels: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """v̂ for labels (B,) and the second head's guiding velocity, in one call of the same batch; see `velocity`."""

        def inside(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            output = self._call(x, t, labels, second_head=True)
            assert output.guiding is not None
            return output.velocity, output.guiding

        return inside

    def mean_velocity(self, labels: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """m̂(x, t, end) of a flow map for labels (B,): x (B, N) and the times (K,) of the step's start and end."""

        return lambda x, t, end: self._call(x, t, labels, ends=_per_image(end, x)).velocity

    @torch.no_grad()
    def _call(self, x: Tensor, t: Tensor, labels: Tensor, **options: Any) -> DiTOutput:
        return self._forward(x, _per_image(t, x), labels, **options)


def _per_image(t: Tensor, x: Tensor) -> Tensor:
    """Times (K,) or (B, K) as (B, K), in the dtype and on the device of x (B, N)."""
    return to_device(t.to(x.dtype), x.device).expand(len(x), -1)


def in_bf16(network: LightningDiT) -> LightningDiT:
    """Copy a network for evaluation, the weights of its blocks' matrix products in bf16."""
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    for module in copied.blocks.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return copied


def require_compiler(device: torch.device) -> None:
    """Refuse to compile where it is not possible."""
    reason = cannot_compile(device)
    if reason is not None:
        raise SFDError(f"networks cannot be compiled here: {reason}; mend that, or leave `compile` at false")


def cannot_compile(device: torch.device) -> str | None:
    """Say why networks cannot be compiled for a device here; None: they can."""
    if not _found("CXX", "g++", "clang++", "cl"):
        return "there is no C++ compiler (g++ or clang++, or another one named by the environment variable CXX)"
    # Compiled code is loaded as a Python module.
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's header files are missing (on Debian and Ubuntu they are the package python3-dev)"
    if device.type == "cuda" and not _found("CC", "gcc", "clang"):
        return "there is no C compiler (gcc or clang, or another one named by the environment variable CC)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    return None


def _found(variable: str, *names: str) -> bool:
    """Whether there is a program: the one that an environment variable names, or one of these."""
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)
