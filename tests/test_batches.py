import os
import threading
import time
from contextlib import closing
from itertools import count

import pytest
import torch

from sfd.training import batches
from sfd.training.batches import ATTEMPT_STEPS, Batches, workers
from sfd.training.config import TrainSettings
from sfd.training.trainer import fit
from test_training import Regression, changed, log, same_weights

SETTINGS = TrainSettings(steps=6, batch_size=4, accumulate=2, learning_rate=1e-3)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KEYS = [(step, range(2 * part, 2 * part + 2)) for step in range(6) for part in range(2)]


def named(step, samples):
    """Make a batch that says which it is."""
    return {"step": torch.tensor(step), "samples": torch.tensor(list(samples))}


def asked_for(batch):
    return int(batch["step"]), range(int(batch["samples"][0]), int(batch["samples"][-1]) + 1)


@pytest.mark.parametrize("threads", [1, 2, 5, 20])
def test_batches_come_in_order_whoever_is_done_first(threads):
    turns = count()

    def make(step, samples):
        time.sleep(0.02 if next(turns) % 3 == 0 else 0)  # some are overtaken
        return named(step, samples)

    with closing(Batches(make, SETTINGS, threads=threads)) as made:
        made.start(0, 0)
        assert [asked_for(made.next()) for _ in KEYS] == KEYS


@pytest.mark.parametrize("threads", [1, 3])
def test_another_start_leaves_nothing_of_the_one_before(threads):
    with closing(Batches(named, SETTINGS, threads=threads)) as made:
        made.start(0, 0)
        made.next()
        made.start(4, 1)
        assert [asked_for(made.next()) for _ in range(4)] == [(ATTEMPT_STEPS + s, r) for s, r in KEYS[8:]]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_that_cannot_be_made_fails_in_its_turn(threads):
    def make(step, samples):
        if step == 1:
            raise ValueError("broken")
        return named(step, samples)

    with closing(Batches(make, SETTINGS, threads=threads)) as made:
        made.start(0, 0)
        assert [asked_for(made.next()) for _ in range(2)] == KEYS[:2]
        with pytest.raises(ValueError, match="broken"):
            made.next()


def test_several_threads_prepare_several_batches_at_once():
    def make(step, samples):
        time.sleep(0.1)
        return named(step, samples)

    def seconds(threads):
        with closing(Batches(make, SETTINGS, threads=threads)) as made:
            start = time.monotonic()
            made.start(0, 0)
            for _ in KEYS:
                made.next()
            return time.monotonic() - start

    assert seconds(6) < 0.5 * seconds(1)


def test_threads_of_several_compute_alone_and_leave_the_others_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def make(step, samples):
            return {"threads": torch.tensor(torch.get_num_threads())}

        with closing(Batches(make, SETTINGS, threads=4)) as made:
            made.start(0, 0)
            assert {int(made.next()["threads"]) for _ in KEYS} == {1}
        new = []
        thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == new[0] == 3
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_suits_the_device(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert workers(SETTINGS, CPU) == 1
    assert workers(SETTINGS, CUDA) == batches.MOST_WORKERS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers(SETTINGS, CUDA) == 3  # of 16 cores, a quarter each, one of them for the loop
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert workers(SETTINGS, CUDA) == 1
    asked = SETTINGS.model_copy(update={"workers": 5})
    assert workers(asked, CPU) == workers(asked, CUDA) == 5


def test_the_number_of_threads_changes_no_byte(tmp_path):
    trained = [fit(Regression(), changed(workers=n), tmp_path / str(n), device=CPU) for n in (1, 5)]
    assert same_weights(*trained)
    assert log(tmp_path / "1") == log(tmp_path / "5")
