"""What worker processes cannot hand over is a line, which a run saves itself before."""

import resource
import signal
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from gkl.data.stores import PictureError
from gkl.data.workers import handed_over, loader


class Pictures(torch.utils.data.Dataset[Any]):
    """Grey ones."""

    def __getitem__(self, item: tuple[int, int]) -> Any:
        return torch.zeros(3, 64, 64, dtype=torch.uint8), item[0]


def small_memory(views: Pictures) -> None:
    """In a process of its own: shared memory is files, and none may have more than 4 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(PictureError, match=r"cannot hand them over .*--shm-size.*or set workers=0$"):
        list(loader(views, [[(n, 0)] for n in range(4)], workers=1))


def test_full_shared_memory_is_a_line() -> None:
    process = mp.get_context("fork").Process(target=small_memory, args=(Pictures(),))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_another_error_stays_what_it_is() -> None:
    def wrong() -> Any:
        yield 1
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="^another$"):
        list(handed_over(wrong()))
