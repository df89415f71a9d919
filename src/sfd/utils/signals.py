"""Stopping on request: Ctrl-C, SIGTERM, SIGUSR1 or the time limit."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sfd.utils import distributed
from sfd.utils.errors import Interrupted, SFDError

# The time is over: sent by `limit`, and by queues that are told to, beforehand (Slurm: --signal=USR1@300).
TIME = getattr(signal, "SIGUSR1", None)
SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, TIME) if number is not None)
REPEAT = 5.0  # seconds until the signal is sent again: Python drops what a handler raises inside a finalizer


@contextmanager
def limit(hours: float | None) -> Iterator[None]:
    """Interrupt the block after this many hours, or at SIGUSR1; training saves its state first."""
    if TIME is None or threading.current_thread() is not threading.main_thread():
        if hours is not None:
            raise SFDError("--max-hours needs the signal SIGUSR1, which this system lacks; leave it out")
        yield
        return
    ended = threading.Event()

    def ring(seconds: float) -> None:
        while not ended.wait(seconds):
            os.kill(os.getpid(), TIME)
            seconds = REPEAT

    def handle(number: int, frame: object) -> None:
        raise Interrupted(number)

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, Interrupted):  # which comes again, and is no fault to report
            reported(dropped)

    reported, sys.unraisablehook = sys.unraisablehook, unraisable
    before = signal.signal(TIME, handle)
    try:
        if hours is not None:
            threading.Thread(target=ring, args=(hours * 3600,), daemon=True).start()
        yield
    finally:
        ended.set()
        signal.signal(TIME, before)
        sys.unraisablehook = reported


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect signals that ask to stop, so that no step is left half done; a second Ctrl-C stops at once.

    Under a launcher it does not: that passes on what each rank has received already.
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
