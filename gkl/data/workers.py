"""The processes that read pictures ahead of a training.

for views, numbers in loader(views, batches, workers=4): ...
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from gkl.data.stores import PictureError

ASKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# Of torch's messages, those that speak of shared memory and of a worker that is gone.
NOT_HANDED_OVER = (
    "unable to resize file", "unable to open shared memory", "unable to mmap", "unable to write to file", "insufficient shared memory",
    "exited unexpectedly", "is killed by signal",
)  # fmt: skip


def loader(views: Any, batches: Iterable[Sequence[tuple[int, int]]], workers: int) -> Iterator[Any]:
    """Views (b, 3, S, S) uint8 and their numbers (b,), batch by batch in the order given, read ahead by worker processes.

    Raises PictureError.
    """
    stream = DataLoader(
        views,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=as_a_worker if workers else None,
        collate_fn=_batched,
    )
    for batch in handed_over(stream):
        if isinstance(batch, PictureError):
            raise batch
        yield batch


def handed_over(stream: Iterable[Any]) -> Iterator[Any]:
    """What worker processes hand over. Raises PictureError where the memory that they share is full, or one of them was killed."""
    try:
        with unheard_at_first():
            begun = iter(stream)  # here they are started
        yield from begun
    except RuntimeError as error:
        if words := not_handed_over(error):
            raise PictureError(words) from error
        raise


@contextmanager
def unheard_at_first() -> Iterator[None]:
    """Inside, this thread's signals wait: Python drops what they raise within fork, and a process that is being started would end by them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def not_handed_over(error: RuntimeError) -> str | None:
    """What to say of an error that is a worker's end or full shared memory; None for another. torch raises the former at any moment."""
    if not any(words in str(error) for words in NOT_HANDED_OVER):
        return None
    last = str(error).strip().splitlines()[-1]
    return (
        f"the processes that read pictures cannot hand them over ({last}); give them more memory, shared memory too (docker run "
        "--shm-size=8g, or space in /dev/shm), or set workers=0"
    )


def _batched(items: list[Any]) -> Any:
    """A batch of views, or what is wrong with the first that is none."""
    return next((item for item in items if isinstance(item, PictureError)), None) or default_collate(items)


def as_a_worker(worker: int) -> None:
    """What a worker process begins with: one thread for its work, and an ear for its run alone.

    A signal to all of a run's processes (a scheduler's, a terminal's) is the run's to heed: it saves itself, and then ends the
    workers. One that died by itself would be an error in the run, which then saved nothing.
    """
    torch.set_num_threads(1)
    sys.excepthook = _unless_the_run_is_gone
    run = multiprocessing.parent_process()
    if run is None or not hasattr(signal, "sigwaitinfo"):  # macOS tells nobody who has sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)

    def listen() -> None:
        while signal.sigwaitinfo(ASKED).si_pid != run.pid:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def _unless_the_run_is_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What a thread of a worker dies of; that nobody is there any more to be handed a picture is for the run to tell."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
