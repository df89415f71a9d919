"""Distributed runs: rank 0 coordinates, and all ranks stop together.

A launcher (`torchrun`, `accelerate launch`, `srun`) starts the ranks, says in the environment which is which, and ends
them all when one fails. Training needs a process group (`init`); work on independent items needs only RANK and
WORLD_SIZE (`rank_slice`), which an array job can set as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sfd.utils.errors import SFDError

COLLECTIVE_TIMEOUT = timedelta(hours=1)  # of what every step does: a rank that hangs for longer is lost
WAIT_TIMEOUT = timedelta(days=7)  # of `barrier` and `broadcast`, which wait for whole stages

Item = TypeVar("Item")
_waiting: Any = None  # the group of `barrier` and `broadcast`; None without a process group


def world_size() -> int:
    """Number of ranks; WORLD_SIZE counts only together with RANK."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this rank, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this is rank 0, which writes the files."""
    return rank() == 0


def local_world_size() -> int:
    """Number of ranks on this machine; 1 where the launcher does not say."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def launched() -> bool:
    """Whether a launcher started this process; it passes signals on to every rank."""
    return world_size() > 1 or restarts_on_failure()


def restarts_on_failure() -> bool:
    """Whether the launcher takes every exit code but 0 for a failure, and may start the ranks again (`torchrun`)."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_slice(items: Sequence[Item]) -> Sequence[Item]:
    """Give this rank's share of independent work: every WORLD_SIZE-th item, from the RANK-th on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" not in os.environ:
        raise SFDError("WORLD_SIZE is set, but RANK is not; set both to split the work, or unset WORLD_SIZE")
    if not 0 <= rank() < world_size():
        raise SFDError(f"RANK is {rank()}, but WORLD_SIZE is {world_size()}; number the ranks from 0")
    return items[rank() :: world_size()]


def local_device(name: str) -> str:
    """Name this rank's GPU: "auto" and "cuda" become "cuda:LOCAL_RANK" where the launcher set that."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda"):
        return name
    import torch

    return f"cuda:{int(local) % torch.cuda.device_count()}" if torch.cuda.is_available() else name


def has_group() -> bool:
    """Whether there is a process group; without one, `broadcast`, `barrier` and `all_reduce_max` are trivial."""
    return _waiting is not None


def init(device: str) -> str:
    """Form the process group that the launcher described, if it did; give the name of this rank's device.

    Args:
        device: what the user asked for, the same on all ranks.
    """
    global _waiting
    if world_size() == 1 or "MASTER_ADDR" not in os.environ or has_group():
        return local_device(device)
    import torch
    import torch.distributed as dist

    if ":" in device:
        raise SFDError(f"the device {device} is one device, but there are {world_size()} ranks; give auto, cpu or cuda")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        raise SFDError(
            "LOCAL_RANK is not set, so all ranks would use the first GPU; start them with torchrun, or set LOCAL_RANK "
            "to each rank's number on its machine (with srun: SLURM_LOCALID)"
        )
    # CPU tensors have a backend of their own, so that ranks can agree without waiting for their GPUs.
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, **_restarted_group())
    _waiting = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    if not gpus:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    torch.cuda.set_device(own)  # NCCL's choice, for as long as the group exists
    return str(own)


def _restarted_group() -> dict[str, Any]:
    """Give the arguments of a group whose ranks torchrun has started again on one node; none otherwise.

    Its store outlives a restart, and so would the addresses of ranks that are gone: each attempt gets keys of its own.
    """
    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if attempt == "0" or not own:
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank(), "world_size": world_size()}


def shutdown() -> None:
    """Leave the process group after all ranks have come here."""
    global _waiting
    if _waiting is not None:
        import torch.distributed as dist

        barrier()
        dist.destroy_process_group()
        _waiting = None


def barrier() -> None:
    """Wait until all ranks have come here."""
    if _waiting is not None:
        _waiting.barrier().wait()


def broadcast(value: Any) -> Any:
    """Give rank 0's value to all ranks."""
    if _waiting is None:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, group=_waiting)
    return values[0]


def decide(question: Callable[[], Any]) -> Any:
    """Give all ranks rank 0's answer, or its refusal: then all raise the same SFDError."""
    answer: Any = None
    if is_main_process() or not has_group():
        try:
            answer = [question(), None]
        except SFDError as error:
            answer = [None, str(error)]
    value, refusal = broadcast(answer)
    if refusal is not None:
        raise SFDError(refusal, said_by_rank_0=not is_main_process() and has_group())
    return value


def all_reduce_max(value: int) -> int:
    """Give the largest of all ranks' values."""
    if _waiting is None:
        return value
    import torch
    import torch.distributed as dist

    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    if _waiting is None:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
