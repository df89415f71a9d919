"""The order of the data, and the threads that prepare batches."""

import os
import threading
import time
from contextlib import closing
from itertools import count

import numpy as np
import pytest
import torch

from helpers.training import Regression, changed, same_weights, timeless_log
from sfd.data.shapes import ShapesSource
from sfd.training import data
from sfd.training.config import TrainSettings
from sfd.training.data import EpochOrder, ImageTask, Prefetcher, num_workers
from sfd.training.trainer import fit

SETTINGS = TrainSettings(steps=6, batch_size=4, accumulate=2, learning_rate=1e-3)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KEYS = [(step, range(2 * micro, 2 * micro + 2)) for step in range(6) for micro in range(2)]


def test_every_epoch_is_a_new_permutation():
    order = EpochOrder(seed=3, length=10)
    seen = np.concatenate([order.indices(step, range(4), 4) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_a_sample_does_not_depend_on_how_its_batch_is_divided():
    batches = ImageTask(torch.nn.Identity(), ShapesSource(10, seed=0), None, seed=3, batch_size=8)

    def draw(samples):
        draws = {"u": batches.uniform("u", 2, samples, 3), "n": batches.normal("n", 2, samples, (2, 2))}
        return batches.batch(2, samples) | draws

    whole, halves = draw(range(8)), [draw(part) for part in (range(4), range(4, 8))]
    for name, values in whole.items():
        assert torch.equal(values, torch.cat([half[name] for half in halves])), name


def identified(step, samples):
    """A batch with its step and samples."""
    return {"step": torch.tensor(step), "samples": torch.tensor(list(samples))}


def key(batch):
    return int(batch["step"]), range(int(batch["samples"][0]), int(batch["samples"][-1]) + 1)


@pytest.mark.parametrize("threads", [1, 2, 5, 20])
def test_batches_are_returned_in_order(threads):
    turns = count()

    def make(step, samples):
        time.sleep(0.02 if next(turns) % 3 == 0 else 0)
        return identified(step, samples)

    with closing(Prefetcher(make, SETTINGS, threads=threads)) as batches:
        batches.start(0)
        assert [key(batches.next()) for _ in KEYS] == KEYS


def test_batches_start_at_any_step_and_are_offset():
    with closing(Prefetcher(identified, SETTINGS.model_copy(update={"data_offset": 1000}), threads=3)) as batches:
        batches.start(4)
        assert [key(batches.next()) for _ in range(4)] == [(1000 + s, r) for s, r in KEYS[8:]]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_is_raised_in_the_order_of_the_batches(threads):
    def make(step, samples):
        if step == 1:
            raise ValueError("broken")
        return identified(step, samples)

    with closing(Prefetcher(make, SETTINGS, threads=threads)) as batches:
        batches.start(0)
        assert [key(batches.next()) for _ in range(2)] == KEYS[:2]
        with pytest.raises(ValueError, match="broken"):
            batches.next()


def test_worker_threads_are_single_threaded_in_pytorch():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def make(step, samples):
            return {"threads": torch.tensor(torch.get_num_threads())}

        with closing(Prefetcher(make, SETTINGS, threads=4)) as batches:
            batches.start(0)
            assert {int(batches.next()["threads"]) for _ in KEYS} == {1}
        new = []
        thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == new[0] == 3
    finally:
        torch.set_num_threads(before)


def test_the_default_number_of_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert num_workers(SETTINGS, CPU) == 1
    assert num_workers(SETTINGS, CUDA) == data.MAX_WORKERS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_workers(SETTINGS, CUDA) == 3  # of 16 cores, a quarter each, one of them for the loop
    assert num_workers(SETTINGS.model_copy(update={"workers": 5}), CPU) == 5


def test_the_number_of_threads_does_not_change_training(tmp_path):
    trained = [fit(Regression(), changed(workers=n), tmp_path / str(n), device=CPU) for n in (1, 5)]
    assert same_weights(*trained)
    assert timeless_log(tmp_path / "1") == timeless_log(tmp_path / "5")
