"""That a time which is over is heard, wherever the program is at that moment."""

import os
import signal
import time

import pytest

from sfd.utils import signals
from sfd.utils.errors import Interrupted


def test_a_time_that_is_over_ends_the_block():
    with pytest.raises(Interrupted) as caught, signals.limit(1e-5):
        time.sleep(10)
    assert caught.value.code == 75


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_is_said_again_to_a_block_that_did_not_hear_it(monkeypatch):
    class Deaf:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)  # the signal is handled here, where Python passes over what is raised

    monkeypatch.setattr(signals, "AGAIN", 0.05)
    with pytest.raises(Interrupted), signals.limit(None):
        deaf = Deaf()
        del deaf
        time.sleep(10)


def test_nothing_rings_after_the_block():
    with signals.limit(1e-4):
        pass
    time.sleep(0.5)
