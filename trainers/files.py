"""Files that are never half-written."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gkl.atomic import atomically
from trainers.errors import RunError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: into a temporary neighbour, synced, then renamed over `path`.

    Raises RunError when the disk is full or the folder cannot be written; what was there before stays.
    """
    try:
        with atomically(path) as temporary:
            write(temporary)
    except (OSError, RuntimeError) as error:  # torch.save wraps the file's own error into a RuntimeError
        origin = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(origin, "strerror", None) or str(origin).splitlines()[0]
        raise RunError(
            f"cannot write {path}: {reason}; the files before it are intact. Free some space or choose another "
            "folder with GKL_OUTPUTS=..., then start the same command again"
        ) from error


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
