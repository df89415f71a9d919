"""Several processes as one run: one leads, the others follow; they stop together, and none waits for a dead one.

A launcher (`torchrun`, `accelerate launch`, `srun`) starts the processes and tells each its rank in the environment.
Work on tensors goes through `torch.distributed`; everything else goes through its key-value store, which can be waited
on for hours and can be asked from a second thread.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sfd.utils.errors import SFDError

STORE_TIMEOUT = timedelta(minutes=10)
COLLECTIVE_TIMEOUT = timedelta(hours=1)
SECONDS_BETWEEN_LOOKS = 0.2
CODE = "code"
# How long a process whose companion failed may go on, to end in its own way.
GRACE_SECONDS = 2.0

Item = TypeVar("Item")


def rank() -> int:
    """This process's number; 0 leads."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """The number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of the launcher's processes on this machine, itself among them; 1 where it does not say."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def is_main_process() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def launched() -> bool:
    """Whether a launcher started this process, alone or with others."""
    return "WORLD_SIZE" in os.environ


def elastic() -> bool:
    """Whether a launcher watches that takes every exit code but 0 for a failure, to be answered with a restart."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_slice(items: Sequence[Item]) -> Sequence[Item]:
    """Give this rank's share of independent work: every WORLD_SIZE-th item, from the RANK-th on.

    It needs these two environment variables alone, and no process group: a launcher sets them, or an array job.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" not in os.environ:
        raise SFDError("WORLD_SIZE is set, but RANK is not; set both to split the work, or unset WORLD_SIZE")
    return items[rank() :: world_size()]


def has_group() -> bool:
    """Whether the ranks can talk to each other; without, `broadcast` and `barrier` do nothing."""
    return _company is not None


def local_device(name: str) -> str:
    """Name the GPU of this rank: "auto" and "cuda" become "cuda:LOCAL_RANK" where the launcher set that."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda"):
        return name
    import torch

    return f"cuda:{int(local) % torch.cuda.device_count()}" if torch.cuda.is_available() else name


class Company:
    """This process among the others of its run."""

    def __init__(self, backend: str) -> None:
        """Meet the others where the launcher said.

        Args:
            backend: of `torch.distributed`.
        """
        import torch.distributed as dist

        # A connection of its own for the thread that watches: one that waits blocks its other callers.
        self._store, self._watched = _connection(host=is_main_process() and not _agent_hosts()), _connection(host=False)
        dist.init_process_group(
            backend, store=self._store, rank=rank(), world_size=world_size(), timeout=COLLECTIVE_TIMEOUT
        )
        self._told, self._met, self._ended = 0, 0, threading.Event()
        self._code: int | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def broadcast(self, value: Any) -> Any:
        """Give the leader's (plain) value to all, who wait for it as long as it takes."""
        self._told += 1
        key = f"told/{self._told}"
        if is_main_process():
            self._store.set(key, json.dumps(value))
            return value
        while not self._store.check([key]):
            time.sleep(SECONDS_BETWEEN_LOOKS / 4)
        return json.loads(self._store.get(key))

    def barrier(self) -> None:
        """Wait until all have come here, as long as it takes."""
        self._met += 1
        key = f"met/{self._met}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < world_size():
            time.sleep(SECONDS_BETWEEN_LOOKS / 4)

    def fail(self, code: int) -> bool:
        """Tell the others that this process ends, and with which exit code; True for the first one that does."""
        self._ended.set()
        try:
            first = bool(self._store.add("failed", 1) == 1)
            if first:
                self._store.set(CODE, str(code))
        except RuntimeError:  # the process that held the store is gone
            return self._code is None
        if is_main_process():
            time.sleep(2 * GRACE_SECONDS)  # the store may be this process's: the others must get to ask it
        return first

    def failed(self) -> int | None:
        """The exit code of a process that failed; None where none said so."""
        try:
            if self._code is None and self._store.check([CODE]):
                self._code = int(self._store.get(CODE))
        except RuntimeError:
            pass
        return self._code

    def shutdown(self) -> None:
        """End in order, after the others have come as far."""
        import torch.distributed as dist

        self.broadcast(None)
        dist.barrier()
        self._ended.set()
        dist.destroy_process_group()

    def _watch(self) -> None:
        """End this process when another one failed: whatever it waits for will not come."""
        while self._code is None and not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                if self._watched.check([CODE]):
                    self._code = int(self._watched.get(CODE))
            except RuntimeError:
                self._code = 1  # the process that held the store is gone
        if self._code is not None and not self._ended.wait(GRACE_SECONDS):
            sys.stderr.flush()
            os._exit(self._code)


def _agent_hosts() -> bool:
    """Whether the elastic launcher's own process holds the store, and keeps it when it starts workers again."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connection(*, host: bool) -> Any:
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=host, wait_for_workers=False, timeout=STORE_TIMEOUT)
    # What was said before a restart does not count.
    return dist.PrefixStore(f"sfd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


_company: Company | None = None


def init(device: str) -> str:
    """Meet the other processes, if there are any; give the name of this one's device.

    Args:
        device: what the user asked for, the same in all processes.

    Raises:
        SFDError: the device can only be one process's, or the launcher did not say where to meet.
    """
    global _company
    if world_size() == 1 or _company is not None:
        return device
    _check_launcher()
    if ":" in device:
        raise SFDError(
            f"--device {device} is one device, but there are {world_size()} processes; give auto, cpu or cuda"
        )
    import torch
    from accelerate import PartialState

    from sfd.utils.progress import console

    cpu = device == "cpu" or not torch.cuda.is_available()
    if not cpu and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise SFDError(
            "LOCAL_RANK is not set, so that all processes would take this machine's first GPU; start them with "
            "torchrun, or set LOCAL_RANK to each one's number on its machine (with srun: SLURM_LOCALID)"
        )
    # CPU tensors have a group of their own, so that processes can agree without waiting for their GPUs.
    _company = Company("gloo" if cpu else "cpu:gloo,cuda:nccl")
    state = PartialState(cpu=cpu)
    console.quiet = not is_main_process()
    return str(state.device)


def _check_launcher() -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SFDError(
            f"WORLD_SIZE says {world_size()} processes, but {', '.join(missing)} is not set; start them with torchrun"
        )
    several_nodes = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if several_nodes and _agent_hosts() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        # Nodes count their restarts differently, so that one could take what was said before a restart for new.
        raise SFDError(
            "several nodes cannot be restarted with a store that outlives the restart; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and use torchrun --rdzv-backend c10d, or give --max-restarts 0"
        )


def check_single(command: str) -> None:
    """Refuse to do as several processes what one does.

    Raises:
        SFDError: a launcher started more than one.
    """
    if world_size() > 1:
        raise SFDError(
            f"`sfd {command}` runs as one process, but a launcher started {world_size()}; start it without the launcher"
        )


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    if _company is None:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def company() -> Company | None:
    """This process among the others; None where it is alone."""
    return _company


def broadcast(value: Any) -> Any:
    """Give the leader's (plain) value to all processes, who wait for it as long as it takes."""
    return _company.broadcast(value) if _company else value


def decide(question: Callable[[], Any]) -> Any:
    """Give all ranks rank 0's (plain) answer, or its refusal: then all raise the same SFDError."""
    answer: Any = None
    if is_main_process() or not has_group():
        try:
            answer = [question(), None]
        except SFDError as error:
            answer = [None, str(error)]
    value, refusal = broadcast(answer)
    if refusal is not None:
        raise SFDError(refusal)
    return value


def barrier() -> None:
    """Wait until all processes have come here, as long as it takes."""
    if _company is not None:
        _company.barrier()


def all_reduce_max(value: int) -> int:
    """Give the largest of all processes' values; they must all ask at the same point."""
    if _company is None:
        return value
    import torch
    import torch.distributed as dist

    shared = torch.tensor(value)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def shutdown() -> None:
    """Part from the other processes in order."""
    global _company
    if _company is not None:
        _company.shutdown()
        _company = None
