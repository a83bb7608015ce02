"""Signals that ask a run to save itself and end."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainers.errors import Interrupted


def heeded() -> list[signal.Signals]:
    """A scheduler's, a terminal's that goes away, a person's; under nohup the second is ignored, and stays so."""
    asked = [signal.SIGINT, signal.SIGTERM]
    return asked if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP, *asked]


def ending() -> None:
    """From now on, as the process is ending already, a Ctrl-C ends it at once and the others change nothing."""
    for signum in heeded():
        signal.signal(signum, _end if signum == signal.SIGINT else signal.SIG_IGN)


def _end(signum: int, frame: object) -> None:
    os._exit(128 + signum)  # the system tells the runs that were started here


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, these signals end the process as they would any: for waits in C, in which Python hears none."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in heeded()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_with_parent() -> None:
    """Be sent SIGTERM when the process that started this one dies, so that one that is killed leaves no run behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Inside, these signals are remembered instead of ending the process; a second SIGINT raises Interrupted at once."""
    received = 0

    def remember(signum: int, frame: object) -> None:
        nonlocal received
        if received == signal.SIGINT == signum:
            raise Interrupted(
                "stopped at once by a second SIGINT; the same command goes on from what was saved before",
                signum,
            )
        received = signum

    before = {s: signal.signal(s, remember) for s in heeded()}
    try:
        yield lambda: received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
