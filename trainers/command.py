"""The border between a script and the shell."""

import errno
import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from gkl.lines import one_line
from trainers.errors import Interrupted, LostProcess, RunError
from trainers.signals import ending, heeded, unheard

DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
)  # a person's to mend, and no bug of ours
AGAIN_SECONDS = 0.05  # after which a signal that was dropped comes again
OTHERS_SECONDS = 2.0  # in which a process that knows better has said so


def run_main(main: Callable[[list[str]], int], usage: str | None = None) -> int:
    """main's exit code; a RunError becomes one line and 2, a signal one line and 128 + its number.

    A second Ctrl-C ends the process at once.
    """
    with patient_streams(), none_swallowed():
        arguments = sys.argv[1:]
        if not gc.isenabled():  # see trainers.interrupt
            gc.freeze()  # modules stay to the end
            gc.enable()
        try:
            for signum in heeded():
                signal.signal(signum, _stop)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded())  # see become
            if {"-h", "--help"} & set(arguments):
                print((usage or "").strip())
                return 0
            return main(arguments)
        except Interrupted as error:
            ending()  # also after a second signal, which fit raises itself
            if _first():
                print(error, file=sys.stderr)
            return 128 + error.signum
        except RunError as error:
            _say(f"error: {error}", secondary=isinstance(error, LostProcess))
            return 2
        except OSError as error:
            if error.errno not in DISK:
                raise
            _say(
                f"error: {error.strerror} at {one_line(error.filename or 'a file of this run')}; what was finished is kept. Mend it, "
                "then start the same command again"
            )
            return 2


def become(command: list[str]) -> NoReturn:
    """Let another command take this process's place; a signal that comes before it listens waits for it."""
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, heeded())
    os.execv(command[0], command)


def _stop(signum: int, frame: FrameType | None) -> None:
    ending()
    name = signal.Signals(signum).name
    raise Interrupted(
        f"stopped by {name}; what was finished is kept. The same command goes on from there", signum
    )


@contextmanager
def none_swallowed() -> Iterator[None]:
    """Inside, a signal that came where Python drops what is raised (a destructor, a hook of fork) comes once more."""
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            before(dropped)
            return
        signum = dropped.exc_value.signum
        for heard in {*heeded(), signum}:  # after _stop they are ignored
            signal.signal(heard, _stop)
        again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signum))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(line: str, secondary: bool = False) -> None:
    """One line a run: a process that is not the first, or knows the consequence alone, waits to be ended by its launcher meanwhile."""
    if wait := OTHERS_SECONDS * ((not _first()) + 2 * secondary):
        with unheard():
            time.sleep(wait)
    print(line, file=sys.stderr)


class _Patient:
    """A standard stream that a run does not depend on: what cannot be written, as its reader has gone, is dropped."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Inside, no terminal that goes away, no `| head -1`, no full disk and no narrow encoding of standard output ends the process."""
    before = sys.stdout, sys.stderr
    patient = []
    for stream in before:
        stream = stream or open(
            os.devnull, "w", encoding="utf-8"
        )  # None: the shell has closed it, and its number is free for any file
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        patient.append(_Patient(stream))
    sys.stdout, sys.stderr = patient
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for one in patient:
            try:
                one.stream.flush()
            except OSError:  # nor does Python's own last flush end it
                os.dup2(os.open(os.devnull, os.O_WRONLY), one.fileno())
