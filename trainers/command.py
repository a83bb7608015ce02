"""The border between a script and the shell."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from trainers.errors import Interrupted, RunError

DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
)  # a person's to mend, and no bug of ours


def run_main(main: Callable[[list[str]], int], usage: str | None = None) -> int:
    """main's exit code; a RunError becomes one line and 2, a signal one line and 128 + its number."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print((usage or "").strip())
        return 0

    def stop(signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        raise Interrupted(
            f"stopped by {name}; what was finished is kept. The same command goes on from there", signum
        )

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    try:
        return main(arguments)
    except Interrupted as error:
        _say(str(error))
        return 128 + error.signum
    except RunError as error:
        _say(f"error: {error}")
        return 2
    except OSError as error:
        if error.errno not in DISK:
            raise
        _say(
            f"error: {error.strerror} at {error.filename or 'a file of this run'}; what was finished is kept. Mend it, "
            "then start the same command again"
        )
        return 2


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # one line a run, not one a process
        print(line, file=sys.stderr)
