"""One network over several processes: a whole copy in each (DDP), or a share of every weight (FSDP2).

Both compute the gradient of the mean over the global batch, so a run may change between them, and the number of
processes, whenever it resumes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from sfd.models.inference import require_compiler
from sfd.models.layers import Block
from sfd.training.batches import parts
from sfd.training.config import TrainSettings
from sfd.utils import distributed
from sfd.utils.errors import SFDError


def check(settings: TrainSettings, device: torch.device) -> None:
    """Refuse what so many processes, or this machine, cannot do.

    Raises:
        SFDError: a batch that does not divide; compiling where that is not possible, or of weights that are shared out.
    """
    if settings.batch_size % parts(settings):
        raise SFDError(
            f"batch_size {settings.batch_size} does not divide over {distributed.world_size()} processes × "
            f"{settings.accumulate} accumulation steps; make it a multiple of {parts(settings)}"
        )
    if settings.compile:
        require_compiler(device)
        if settings.parallel == "fsdp" and distributed.world_size() > 1:
            raise SFDError("shared weights (fsdp) cannot be compiled; give parallel: ddp or compile: false")


class Parallel:
    """A network in training, and how its processes share it."""

    def __init__(self, network: nn.Module, kind: str, device: torch.device, *, compiled: bool = False) -> None:
        """Place the network on the device, or its share; every process must hold the same weights.

        Args:
            network: its parameters become this process's share where `kind` is "fsdp".
            kind: "auto", "ddp" or "fsdp"; one process alone needs none of them.
            device: this process's own.
            compiled: whether what is trained is a compiled form of the network; see `check`.
        """
        self.device = device
        self.sharded = kind == "fsdp" and distributed.world_size() > 1
        # What a gathered copy is made from; sharding changes the network itself.
        self._plain = copy.deepcopy(network).to("meta") if self.sharded else None
        self.network = network.to(device).train()
        if self.sharded:
            shard(self.network, device)
        self.model: nn.Module = cast(nn.Module, torch.compile(self.network)) if compiled else self.network
        if not self.sharded and distributed.world_size() > 1:
            self.model = copied(self.model, device)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Exchange gradients only in the last of a step's backward passes."""
        if self.sharded:
            self.network.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif distributed.world_size() == 1 or last:
            yield
        else:
            with self.model.no_sync():  # type: ignore[operator]
                yield

    def average(self) -> nn.Module:
        """Copy the network, shared alike, for its moving average."""
        if self._plain is None:
            return copy.deepcopy(self.network).eval().requires_grad_(False)
        twin = filled(self._plain, self.network, self.device)
        shard(twin, self.device)
        with torch.no_grad():
            for to, of in zip(local(twin.parameters()), local(self.network.parameters()), strict=True):
                to.copy_(of)
        return twin.eval().requires_grad_(False)

    def gathered(self, network: nn.Module) -> nn.Module:
        """Give a network or its average as a whole one, in evaluation mode; all processes must ask together."""
        if self._plain is None:
            return network.eval()
        copied = filled(self._plain, network, self.device)
        targets = copied.state_dict()
        for name, tensor in network.state_dict().items():
            targets[name].copy_(whole(tensor))
        return copied.eval()

    def norm(self, shares: Iterable[Tensor]) -> Tensor:
        """Compute the Euclidean norm of all tensors together, given this process's shares, without waiting for it."""
        square = torch.stack([share.float().square().sum() for share in shares]).sum()
        if self.sharded:
            torch.distributed.all_reduce(square)
        return square.sqrt()


def copied(network: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a network whose copies in all processes exchange their gradients."""
    own = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # No buffer changes in training, so none is sent; the way to say so is about to get another name.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            network, device_ids=own, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def shard(network: nn.Module, device: torch.device) -> None:
    """Share a network's parameters out over the processes, block by block; they become `DTensor`s."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nothing here changes
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for module in network.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def filled(plain: nn.Module, like: nn.Module, device: torch.device) -> nn.Module:
    """Make a network from one without memory, with the buffers of another; its parameters are yet to be filled."""
    network = copy.deepcopy(plain).to_empty(device=device)
    for to, of in zip(network.buffers(), like.buffers(), strict=True):
        to.copy_(of)
    return network


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Give this process's share of each tensor: all of it, where it is not shared out."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """Give a tensor that may be shared out as a plain one; all processes must ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
