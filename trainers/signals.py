"""Signals that ask a run to save itself and end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Inside, SIGINT and SIGTERM are remembered instead of ending the process; a second SIGINT ends it at once."""
    received = 0

    def remember(signum: int, frame: object) -> None:
        nonlocal received
        if received == signal.SIGINT == signum:
            raise KeyboardInterrupt
        received = signum

    before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
