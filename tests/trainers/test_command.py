"""The border to the shell: signals and standard streams, in processes of their own as a person starts them."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = """
import sys, time
from pathlib import Path
from trainers.command import become, run_main
def main(arguments):
    for number in range(int(arguments[0])):
        print(f"ℓ∞, ε = 8/255, line {number}")
        print(f"ℓ∞, ε = 8/255, line {number}", file=sys.stderr, flush=True)
    Path(arguments[1]).write_text("done")
    return 3
sys.exit(run_main(main))
"""


def command(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


@pytest.mark.parametrize("lines", [1, 20000])  # what a buffer holds, and more
def test_a_reader_that_goes_away_ends_nothing(lines: int, tmp_path: Path) -> None:
    """As `| head -1` does."""
    process = subprocess.Popen(
        command(SHORT, lines, tmp_path / "done"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.close(), process.stderr.close()
    assert process.wait(60) == 3 and (tmp_path / "done").exists()


def test_a_terminal_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    """Writing to it gives EIO."""
    master, slave = pty.openpty()
    program = "import time; time.sleep(0.5)\n" + SHORT
    process = subprocess.Popen(
        command(program, 100, tmp_path / "done"), env=environment(), stdout=slave, stderr=slave
    )
    os.close(slave), os.close(master)
    assert process.wait(60) == 3 and (tmp_path / "done").exists()


def test_a_full_disk_under_the_log_ends_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(SHORT, 5, tmp_path / "done"), env=environment(), stdout=full, stderr=full, check=False
        )
    assert done.returncode == 3 and (tmp_path / "done").exists()


def test_streams_that_the_shell_has_closed_end_nothing_and_their_numbers_are_no_file_s(
    tmp_path: Path,
) -> None:
    line = f'"{sys.executable}" -c "$PROGRAM" 5 "{tmp_path}/done" >&- 2>&-'
    done = subprocess.run(["sh", "-c", line], env=environment(PROGRAM=SHORT), check=False)
    assert done.returncode == 3 and (tmp_path / "done").read_text() == "done"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_stream_cannot_encode_is_spelt(encoding: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command(SHORT, 1, tmp_path / "done"), env=environment(PYTHONIOENCODING=encoding), capture_output=True, check=False
    )  # fmt: skip
    said = "ℓ∞, ε" if encoding == "utf-8" else r"\u2113\u221e, \u03b5"
    assert done.returncode == 3 and done.stdout.decode(encoding) == f"{said} = 8/255, line 0\n"


LONG = """
import sys, time
from pathlib import Path
from trainers.command import run_main
def main(arguments):
    try:
        Path(arguments[0]).write_text("begun")
        time.sleep(60)
    finally:
        Path(arguments[0]).write_text("ending")
        time.sleep(60)
sys.exit(run_main(main))
"""


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or path.read_text() != text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_interrupt_ends_what_is_ending_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(LONG, tmp_path / "at"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    wait_for(tmp_path / "at", "begun")
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "at", "ending")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == err == ""


DROPPED = """
import os, signal, sys, threading, time
from trainers.command import run_main
class Last:
    def __del__(self):
        os.kill(os.getpid(), {signum})
        time.sleep(0)
def main(arguments):
    if "fork" in arguments:
        os.register_at_fork(before=lambda: os.kill(os.getpid(), {signum}))
        if os.fork() == 0:
            os._exit(0)
    else:
        Last()
    time.sleep(20)
    return 0
sys.exit(run_main(main))
"""


@pytest.mark.parametrize("where", ["destructor", "fork"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_where_python_drops_what_is_raised_is_heeded(where: str, signum: signal.Signals) -> None:
    """Once it was an ignored exception, and the run went on and heard no other."""
    program = DROPPED.format(signum=int(signum))
    begun = time.monotonic()
    done = subprocess.run(
        command(program, where), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signum and time.monotonic() - begun < 15
    assert done.stderr.startswith(f"stopped by {signum.name}; ") and done.stderr.count("\n") == 1


AFTER = """
import atexit, os, signal, sys, time
from trainers.command import run_main
from trainers.signals import signals
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
def main(arguments):
    with signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
sys.exit(run_main(main))
"""


def test_a_third_interrupt_prints_no_traceback_either() -> None:
    done = subprocess.run(command(AFTER), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.startswith("stopped at once by a second SIGINT") and done.stderr.count("\n") == 1


def test_memory_is_collected_again_when_the_imports_are_over() -> None:
    program = """
import gc, sys
import trainers.interrupt
from trainers.command import run_main
before = gc.isenabled()
sys.exit(run_main(lambda _: print(before, gc.isenabled()) or 0))
"""
    done = subprocess.run(command(program), env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False True\n")


BECOMING = """
import os, signal, sys
from trainers.command import become, run_main
program = "import os, signal, sys, time; time.sleep(0.3); from trainers.command import run_main; sys.exit(run_main(lambda _: 0))"
def main(arguments):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    os.kill(os.getpid(), signal.SIGINT)  # while the process turns into another
    become([sys.executable, "-c", program])
sys.exit(run_main(main))
"""


def test_a_signal_between_two_processes_waits_for_the_second() -> None:
    done = subprocess.run(command(BECOMING), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == (
        "stopped by SIGINT; what was finished is kept. The same command goes on from there\n"
    )


def test_a_signal_within_composition_is_one_line() -> None:
    """Sent by the configuration itself, where Hydra and OmegaConf catch every Exception."""
    program = f"""
import os, sys
from omegaconf import OmegaConf
from trainers.command import run_main
from trainers.runs.compose import compose
OmegaConf.register_new_resolver("stopped", lambda: os.kill(os.getpid(), {int(signal.SIGHUP)}))
sys.exit(run_main(lambda arguments: compose("train", arguments) and 0))
"""
    done = subprocess.run(
        command(program, "experiment=at/c100_basic_gkl", "scale=smoke", "epochs=${stopped:}"),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGHUP
    assert done.stderr.startswith("stopped by SIGHUP; ") and done.stderr.count("\n") == 1
