"""Stopping on request, between steps: Ctrl-C, SIGTERM, or the time that a queue gives."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sfd.utils import distributed
from sfd.utils.errors import Interrupted, SFDError

# That the time is over: what `limit` sends, and what queues can be told to send beforehand (Slurm: --signal=USR1@300).
TIME = getattr(signal, "SIGUSR1", None)
# To be heard between steps: Ctrl-C, what queues and launchers send, and that.
SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, TIME) if number is not None)

AGAIN = 5.0  # seconds after which a block that has not ended is told again that its time is over


@contextmanager
def limit(hours: float | None) -> Iterator[None]:
    """Interrupt the block after so many hours, counted from when the launcher started, whatever the wall clock does.

    Raises:
        SFDError: this system lacks the signal.
        Interrupted: the time is over; training has saved its state.
    """
    if TIME is None or threading.current_thread() is not threading.main_thread():
        if hours is not None:
            raise SFDError("--max-hours needs the signal SIGUSR1, which cannot be had here; leave it out")
        yield
        return
    over = False
    timers: list[threading.Timer] = []

    def ring(seconds: float) -> None:
        timers.append(threading.Timer(seconds, os.kill, (os.getpid(), TIME)))
        timers[-1].daemon = True
        timers[-1].start()

    def handle(number: int, frame: object) -> None:
        nonlocal over
        over = True
        # Python passes over what is raised while it clears an object away, so it is said again.
        ring(AGAIN)
        raise KeyboardInterrupt  # which, unlike `Interrupted`, nobody takes for an error of what it came into

    before = signal.signal(TIME, handle)
    try:
        if hours is not None:
            ring(max(hours * 3600 - _spent(), 0.0))
        yield
    except KeyboardInterrupt:
        if over:
            raise Interrupted(TIME) from None
        raise
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(TIME, before)


def _spent() -> float:
    """Seconds since an elastic launcher, which starts workers again when one fails, was itself started; else 0."""
    if not distributed.elastic():
        return 0.0
    import psutil

    # Both are taken now, so that a wall clock that was set in between does not matter.
    return max(time.time() - psutil.Process(os.getppid()).create_time(), 0.0)


@contextmanager
def requests() -> Iterator[list[int]]:
    """Collect signals that ask to stop, so that a step is never left half done; a second Ctrl-C stops at once.

    But not under a launcher, which passes on what each process has heard already.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT and not distributed.launched():
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
