"""Files and folders that are never half-written.

with atomically(path) as temporary:
    temporary.write_text("whole")
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNCHANGED_SECONDS = 600.0  # after which a file that is being written has failed, on whichever machine
STALE_SECONDS = 3600.0  # no file takes as long to write


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to be written, a file or a folder; at the end it is synced and renamed to `path`, if nothing was raised.

    What processes that were killed have left of the same path is removed. Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path.parent, f".{path.name}.*", UNCHANGED_SECONDS)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a write says not where
            error.filename = str(path)
        raise
    finally:
        remove(temporary)


def clear(folder: Path, names: str = ".*", unchanged: float = 0.0) -> None:
    """Remove the temporary files of processes that are no more, here or, by their age, on another machine.

    names: what they begin with, a pattern. unchanged: seconds, where other machines may be writing there.
    """
    for path in folder.glob(f"{names}.tmp*"):
        owner = re.search(r"\.(\d+)\.tmp(\.\w+)?$", path.name)
        with suppress(OSError):  # another start removes it, too
            age = time.time() - path.stat().st_mtime
            if owner and ((not alive(int(owner[1])) and age >= unchanged) or age > STALE_SECONDS):
                remove(path)


def remove(path: Path) -> None:
    """A file, or a folder and what is in it; nothing where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def alive(process: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another person's
        return True
    return True
