"""One run's folder: its lock, checkpoints, history and frozen configuration. Nothing in it is ever half-written."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from trainers.errors import RunError
from trainers.files import save, write_atomically, write_text

GRACE_SECONDS = 10.0  # that a run which was told to stop has for its last checkpoint


class RunFolder:
    """The files of one run. Only process 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history_path = path / "history.jsonl"

    def open(self, name: str) -> IO[str]:
        """A file of it to append to, the folder made if need be. Raises RunError if it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return open(self.path / name, "a")
        except OSError as error:
            raise RunError(
                f"cannot write in the output folder {self.path}: {error.strerror}; choose another with GKL_OUTPUTS=..."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. Raises RunError if another run holds it or it cannot be written."""
        lock = self.open("lock")
        with lock:
            deadline = time.monotonic() + GRACE_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise RunError(
                            f"another process is running in {self.path}; wait for it, or stop it, or change the seed"
                        ) from None
                    time.sleep(0.2)
            yield

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Make `state` the last checkpoint and keep the one before it."""
        last, previous = self._checkpoints()

        def write(path: Path) -> None:
            save(path, state)
            if last.exists():
                os.replace(last, previous)  # between the two renames `previous` is the one to go on from

        write_atomically(last, write)

    def load_checkpoint(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The last whole checkpoint, on the CPU; damaged ones are named through `warn` and passed over."""
        for path in self._checkpoints():
            if not path.exists():
                continue
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged file makes torch.load raise
                warn(
                    f"checkpoint {path} is damaged ({str(error).splitlines()[0][:120]}); using the one before it"
                )
        return None

    def _checkpoints(self) -> tuple[Path, Path]:
        return self.path / "checkpoints" / "last.pt", self.path / "checkpoints" / "previous.pt"

    def append_history(self, row: dict[str, Any]) -> None:
        """Add one line to history.jsonl."""
        with open(self.history_path, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """All whole lines of history.jsonl."""
        if not self.history_path.exists():
            return []
        rows = []
        for line in self.history_path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # the line a crash cut short
                break
        return rows

    def truncate_history(self, before_epoch: int) -> None:
        """Keep the rows of epochs below `before_epoch`: those that the checkpoint to go on from knows of."""
        rows = [row for row in self.history() if row["epoch"] < before_epoch]
        write_text(self.history_path, "".join(json.dumps(row) + "\n" for row in rows))
