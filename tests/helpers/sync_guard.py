"""A device that is far away, as a GPU is: PyTorch's "meta", whose tensors have shapes but no numbers.

Whatever would look at numbers there fails by itself: `.item()`, `float`, `bool`, `nonzero`, boolean masks, copies to
the CPU; and so do most operations on tensors of both devices. `forbid_syncs` refuses what is left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfd.utils import device

FAR = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class ImplicitSync(AssertionError):
    """On a GPU, the CPU would wait here for all that was asked of it before."""


class Float64(AssertionError):
    """Apple's GPUs know no float64."""


class _Operations(TorchDispatchMode):
    """Refuses copies to the device that are waited for, the CPU's tensors among those of the device, and float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        near = [t for t in tensors if t.device != FAR]
        far = len(near) < len(tensors) or kwargs.get("device") == FAR
        if near and far:
            if func in COPIES:
                if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                    raise ImplicitSync(f"a copy of {tuple(near[0].shape)} to the device")
            elif any(t.dim() for t in near):  # a number of the CPU may take part: it travels with the kernel
                raise ImplicitSync(f"{func} takes a tensor {tuple(near[0].shape)} of the CPU among those of the device")
        results = func(*args, **kwargs)
        if any(isinstance(r, Tensor) and r.device == FAR and r.dtype == torch.float64 for r in tree_leaves(results)):
            raise Float64(f"{func} gives float64 on the device")
        return results


def _refusing(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Refuse tensors made of Python numbers on the device: they are copied, too."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        result = make(*args, **kwargs)
        if result.device == FAR:
            raise ImplicitSync(f"{make.__name__}({args[-1]}) on the device")
        return result

    return made


@contextmanager
def forbid_syncs() -> Iterator[None]:
    """Fail where the CPU would wait for the device, tensors of both meet, or the device would need float64."""
    with _Operations(), pytest.MonkeyPatch.context() as patch:
        for place, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
            patch.setattr(place, name, _refusing(getattr(place, name)))
        yield


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The far device, treated as a GPU is where there is no GPU to ask: pinning, autocast, fused optimizer."""
    monkeypatch.setattr(device, "NON_BLOCKING", {FAR.type})
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    for kind in ("fused", "foreach"):
        kernels = f"_get_{kind}_kernels_supported_devices"
        for module in (sys.modules[Optimizer.__module__], _foreach_utils):
            if hasattr(module, kernels):
                monkeypatch.setattr(module, kernels, lambda: [FAR.type, "cpu"])
    return FAR
