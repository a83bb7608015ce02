"""Files that are never half-written."""

import errno
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trainers.errors import RunError

STALE_SECONDS = 3600.0  # no file takes as long to write


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: into a temporary neighbour, synced, then renamed over `path`.

    Raises RunError when the disk is full or the folder cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(
            error, OSError | RuntimeError
        ):  # a signal; torch.save wraps the file's own error into a RuntimeError
            raise
        origin = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(origin, "strerror", None) or str(origin).splitlines()[0]
        raise RunError(
            f"cannot write {path}: {reason}; the files before it are intact. Free some space or choose another "
            "folder with GKL_OUTPUTS=..., then start the same command again"
        ) from error


def clear(folder: Path, names: str = ".*") -> None:
    """Remove the temporary files of processes that are no more, here or, by their age, on another machine."""
    for path in folder.glob(f"{names}.tmp*"):
        owner = re.search(r"\.(\d+)\.tmp(\.\w+)?$", path.name)
        with suppress(OSError):  # another start removes it, too
            if owner and (not alive(int(owner[1])) or time.time() - path.stat().st_mtime > STALE_SECONDS):
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


def read_file(path: Path) -> bytes:
    """The bytes of a file, whatever is wrong with it an OSError: a folder, a pipe that would be waited for, a loop of links."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.read_bytes()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_state(path: Path, state: Any) -> None:
    """Write tensors and plain values with torch.save, whole or not at all."""
    write_atomically(path, lambda temporary: save(temporary, state))


def save(path: Path, state: Any) -> None:
    """Write with torch.save."""
    with open(path, "wb") as file:  # by a path, torch would not say why a write failed
        torch.save(state, file)
