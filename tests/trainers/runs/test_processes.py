"""The processes of a run: what they share, wait for, leave behind, and how one that fails ends the others."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gkl.atomic import clear
from gkl.evaluation import kept
from trainers.errors import ConfigError, RunError
from trainers.loop.accuracy import told_as_lost
from trainers.loop.folder import RunFolder
from trainers.runs import processes

ROOT = Path(__file__).resolve().parents[3]
BEGIN = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
from trainers import command
from trainers.command import run_main
from trainers.errors import RunError
from trainers.runs import processes
from gkl.distributed import agree, rank
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def two(
    body: str, *arguments: object, wait: float = 60.0, patience: float = 0.1
) -> list[subprocess.Popen[str]]:
    """Two processes of a run, without a launcher, that execute `body` within their group; each gets its own argument.

    wait, patience: seconds for each other's work, and for each other's words.
    """
    program = f"{BEGIN}\nprocesses.WAIT = timedelta(seconds={wait})\ncommand.OTHERS_SECONDS = {patience}\ndef main(arguments):\n"
    program += "    with processes.process_group({'device': 'cpu'}):\n"
    program += (
        "".join(f"        {line}\n" for line in body.splitlines()) + "    return 0\nsys.exit(run_main(main))"
    )
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, str(arguments[number] if arguments else "")],
            env={**os.environ, **shared, "PYTHONPATH": str(ROOT), "RANK": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for number in range(2)
    ]  # fmt: skip


def ended(both: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    found = [process.communicate(timeout=90) for process in both]
    return [(process.returncode, err) for process, (_, err) in zip(both, found, strict=True)]


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2"}, True),
        ({"RANK": "x"}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "4", "WORLD_SIZE": "4"}, True),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, True),
        ({"LOCAL_RANK": "1"}, True),
    ],
)
def test_what_another_launcher_left_in_the_environment_is_one_line(
    given: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if not refused:
        processes.check_ranks()
        return
    with pytest.raises(ConfigError, match="start it with torchrun, or unset them") as error:
        processes.check_ranks()
    assert all(f"{name}={value}" in str(error.value) for name, value in given.items())


def test_machines_that_do_not_share_their_outputs_are_told_before_training(tmp_path: Path) -> None:
    body = "processes.SHARED_SECONDS = 1.0\nown = Path(arguments[0])\n"
    body += "processes.check_shared([own.parent])\nprocesses.check_shared([own])"
    places = tmp_path / "one", tmp_path / "other"
    for place, (code, err) in zip(places, ended(two(body, *places)), strict=True):
        assert code == 2 and err.count("\n") == 1, err
        assert (
            err.startswith(f"error: the processes of this run do not see the same files under {place};")
            and "set GKL_OUTPUTS and GKL_RESULTS" in err
        )
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_process_that_loses_another_says_so_in_one_line() -> None:
    body = "if rank():\n    os.kill(os.getpid(), signal.SIGKILL)\nagree(1)"
    (first, err), (second, _) = ended(two(body))
    assert (first, second) == (2, -signal.SIGKILL) and err.count("\n") == 1
    assert (
        err.startswith("error: process 0 of this run has lost another")
        and "the last checkpoint is intact" in err
    )


def test_a_wait_for_another_process_ends_in_time_with_a_line() -> None:
    """It lives, and does not answer."""
    body = "if rank():\n    time.sleep(30)\nelse:\n    agree(1)"
    both = two(body, wait=3)
    _, err = both[0].communicate(timeout=60)
    both[1].kill()
    both[1].communicate()
    assert both[0].returncode == 2 and "has lost another, or waited for it" in err and err.count("\n") == 1, (
        err
    )


def test_a_process_that_never_comes_is_waited_for_no_longer_than_told() -> None:
    first, second = two("pass", wait=3)
    second.kill()
    second.communicate()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 2 and err.strip().splitlines()[-1].startswith(
        "error: process 0 of this run has lost"
    )


def test_the_reason_is_said_by_whoever_knows_it() -> None:
    """Process 1 alone fails; what process 0 notices of it is no second line, as the launcher ends it."""
    body = "if rank():\n    raise RunError('this machine has no such card')\nagree(1)"
    first, second = two(body, patience=4.0)
    _, err = second.communicate(timeout=60)
    first.terminate()
    _, other = first.communicate(timeout=60)
    assert second.returncode == 2 and err == "error: this machine has no such card\n"
    assert first.returncode == -signal.SIGTERM and other == ""


def test_another_process_s_batch_is_waited_for_no_longer_than_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "PATIENCE_HOURS", 0.0)
    with (
        pytest.raises(RunError, match="no process has finished apgd-ce, batch 3, .*apgd-ce_00003.npz"),
        told_as_lost(),
    ):
        kept.Kept(tmp_path, {}, torch.zeros(1)).awaited("apgd-ce", 3, torch.arange(2))


@contextmanager
def service(answer: bytes | None) -> Iterator[int]:
    """A port where something else listens: silent with None, else it says that and closes."""
    kept_open = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept_open.append(connection)
                if answer is not None:
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield int(server.getsockname()[1])
    for connection in kept_open:
        connection.close()


@pytest.mark.parametrize(
    "answer", [None, pytest.param(b"", marks=pytest.mark.long), b"HTTP/1.1 400 Bad Request\r\n\r\n"]
)
def test_an_endpoint_taken_by_another_service_is_told_in_time(answer: bytes | None) -> None:
    program = BEGIN + "sys.exit(run_main(lambda a: processes._check_endpoint('127.0.0.1:' + a[0], 2.0) or 0))"
    with service(answer) as port:
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, str(port)], env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and time.monotonic() - begun < 30
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("error: another service than a run's meeting place answers at 127.0.0.1")
        and "Traceback" not in done.stderr
    )


def test_a_meeting_place_is_no_other_service() -> None:
    port = free_port()
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    processes._check_endpoint(f"127.0.0.1:{port}", 5.0)
    del store
    processes._check_endpoint(f"127.0.0.1:{free_port()}", 5.0)  # nobody yet


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    attack = tmp_path / "autoattack/0123"
    attack.mkdir(parents=True), (tmp_path / "checkpoints").mkdir()
    left = [
        tmp_path / f"checkpoints/.last.pt.{gone.pid}.tmp", tmp_path / f".progress.{gone.pid}.tmp",
        attack / f".clean_00000.{gone.pid}.tmp.npz", tmp_path / f".history.jsonl.{os.getpid()}.tmp",
    ]  # fmt: skip
    kept_ = [
        tmp_path / f".swa.pt.{os.getpid()}.tmp", tmp_path / ".mine.tmp", tmp_path / f"notes.{gone.pid}.tmp",
        tmp_path / "checkpoints/last.pt",
    ]  # fmt: skip
    for path in left + kept_:
        path.write_text("")
    os.utime(
        left[-1], (0, 0)
    )  # its number is that of a process here by chance: another machine's, of long ago
    RunFolder(tmp_path).clear()
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept_)
    other = tmp_path / f".seed1.json.{gone.pid}.tmp"
    other.write_text("")
    clear(tmp_path, ".seed0.json*")
    assert other.exists()
