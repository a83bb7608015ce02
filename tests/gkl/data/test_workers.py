"""What worker processes cannot hand over is a line, which a run saves itself before."""

import resource
import signal
import subprocess
import sys
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


BEGINNING = """
import os, signal, sys, time
from gkl.data.workers import loader
from tests.gkl.data.test_workers import Pictures
from trainers.command import run_main
os.register_at_fork(
    before=lambda: os.kill(os.getpid(), signal.SIGTERM),
    after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM),
)
sys.exit(run_main(lambda _: list(loader(Pictures(), [[(n, 0)] for n in range(400)], workers=2)) and time.sleep(60)))
"""


def test_a_signal_while_workers_are_started_is_the_run_s_to_heed() -> None:
    """Once the first was dropped within fork, and a worker that heard it printed a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.startswith("stopped by SIGTERM; ") and done.stderr.count("\n") == 1


class Left(Pictures):
    """Whose worker has a thread to which something happens, as multiprocessing's that hands over tensors."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, item: tuple[int, int]) -> Any:
        sys.excepthook(type(self.error), self.error, None)
        return super().__getitem__(item)


def test_a_run_that_is_gone_is_no_traceback_of_its_workers(capfd: pytest.CaptureFixture[str]) -> None:
    list(loader(Left(ConnectionResetError(104, "reset by peer")), [[(0, 0)]], workers=1))
    assert capfd.readouterr().err == ""
    list(loader(Left(TypeError("a bug")), [[(0, 0)]], workers=1))
    assert "TypeError: a bug" in capfd.readouterr().err
