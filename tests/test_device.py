"""Devices, ranks, and time limits."""

import time

import pytest
import torch

from sfd.utils import distributed, signals
from sfd.utils.device import choose_device, full_float32, peak_memory
from sfd.utils.errors import Interrupted, SFDError


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", "vulkan"])
def test_an_unusable_device_is_refused(name):
    with pytest.raises(SFDError, match=f"the device '{name}' cannot be used") as refusal:
        choose_device(name)
    assert len(str(refusal.value)) < 300 and "\n" not in str(refusal.value)


def test_choosing_a_device_changes_no_global_state(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    assert torch.backends.cudnn.allow_tf32
    with full_float32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_the_memory_of_the_process_is_measured():
    assert 1e7 < peak_memory(torch.device("cpu"))["peak_memory_bytes"] < 1e12


def test_independent_work_is_split_by_rank_and_world_size(monkeypatch):
    items = list(range(10))
    assert distributed.rank_slice(items) == items
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SFDError, match="RANK is not"):
        distributed.rank_slice(items)
    assert distributed.world_size() == 1 and distributed.is_main_process()  # a leftover by itself means nothing
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(distributed.rank_slice(items))
    assert sorted(item for part in parts for item in part) == items and parts[1] == [1, 4, 7]
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SFDError, match="number the ranks from 0"):
        distributed.rank_slice(items)


def test_collectives_without_a_process_group_return_their_argument(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert distributed.init("cpu") == "cpu" and not distributed.has_group()
    assert (distributed.broadcast(5), distributed.decide(lambda: 6), distributed.all_reduce_max(7)) == (5, 6, 7)
    distributed.barrier()


def test_several_ranks_on_gpus_need_local_rank(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SFDError, match="LOCAL_RANK is not set"):
        distributed.init("auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_device("auto") == "cuda:1"


def test_a_time_limit_interrupts_the_block():
    with pytest.raises(Interrupted) as caught, signals.limit(1e-5):
        time.sleep(10)
    assert caught.value.code == 75


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_was_lost_in_a_destructor_is_sent_again(monkeypatch):
    class Slow:
        def __del__(self):
            time.sleep(0.3)  # Python drops exceptions raised here

    monkeypatch.setattr(signals, "REPEAT", 0.5)
    with pytest.raises(Interrupted), signals.limit(1e-5):
        slow = Slow()
        del slow
        time.sleep(10)
