"""One run's folder: its lock, checkpoints, history and frozen configuration. Nothing in it is ever half-written."""

import fcntl
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch

from gkl.atomic import clear
from gkl.lines import one_line
from trainers.errors import RunError, in_a_line
from trainers.files import read_file, save, write_atomically, write_text

GRACE_SECONDS = 10.0  # that a run which was told to stop has for its last checkpoint


class RunFolder:
    """The files of one run. Only process 0 writes."""

    def __init__(self, path: Path, run: str | None = None) -> None:
        """run: what tells it from every other, for its checkpoints."""
        self.path, self.run = path, run
        self.damaged: set[Path] = set()  # checkpoints that were passed over
        self.history_path = path / "history.jsonl"

    def open(self, name: str) -> IO[str]:
        """A file of it to append to, the folder made if need be. Raises RunError if it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return open(self.path / name, "a", encoding="utf-8")
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

    def clear(self) -> None:
        """Remove what processes that were killed have left half-written; the lock is held, so nobody else is at work here."""
        for folder in (self.path, *(found for found in self.path.rglob("*") if found.is_dir())):
            clear(folder)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Make `state` the last checkpoint and keep the whole one before it."""
        last, previous = self._checkpoints()

        def write(path: Path) -> None:
            save(path, {**state, "run": self.run} if self.run else state)
            if last.exists() and last not in self.damaged:
                os.replace(last, previous)  # between the two renames `previous` is the one to go on from

        write_atomically(last, write)
        self.damaged.discard(last)

    def load_checkpoint(self, warn: Callable[[str], None]) -> Any:
        """What the last whole checkpoint holds, on the CPU; None where there is none.

        One whose bytes are proven to be no longer those that were written is named through `warn` and passed over.
        Raises RunError for one that cannot be read or that is something else: it may be good, and stays.
        """
        self.damaged.clear()
        for path in self._checkpoints():
            if not os.path.lexists(path):
                continue
            try:
                content = read_file(path)
                if (why := damage(content)) is None:
                    return self._own(torch.load(BytesIO(content), map_location="cpu", weights_only=True))
            except RunError:
                raise
            except Exception as error:  # what torch.load raises of a whole file, too: memory, code in it
                why = error.strerror if isinstance(error, OSError) else in_a_line(error)
                raise RunError(
                    f"cannot read the checkpoint {path} ({why}); nothing was changed. Make it readable and start again, or move "
                    "it away to go on without it"
                ) from error
            warn(f"checkpoint {path} is damaged ({why}) and passed over")
            self.damaged.add(path)
        if self.damaged:
            warn(f"no whole checkpoint is left in {self.path}; starting at epoch 1")
        return None

    def _own(self, checkpoint: Any) -> Any:
        """A checkpoint. Raises RunError for another run's; those of version 0.1 do not say whose they are."""
        run = checkpoint.get("run") if isinstance(checkpoint, dict) else None
        if None not in (run, self.run) and run != self.run:
            raise RunError(
                f"the checkpoint in {self.path} is of another run, {one_line(run)}; nothing was changed. Bring this run's own "
                "checkpoints back, or move that folder away to train anew"
            )
        return checkpoint

    def _checkpoints(self) -> tuple[Path, Path]:
        return self.path / "checkpoints" / "last.pt", self.path / "checkpoints" / "previous.pt"

    def append_history(self, row: dict[str, Any]) -> None:
        """Add one line to history.jsonl. Raises RunError where it cannot be written, as the folder is gone."""
        try:
            with open(self.history_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write {self.history_path}: {error.strerror}; mend it, or free some space, then start the same command again, which "
                "goes on from the last checkpoint that is there"
            ) from error

    def history(self) -> list[dict[str, Any]]:
        """All whole lines of history.jsonl. Raises RunError if it cannot be read."""
        rows: list[dict[str, Any]] = []
        if not os.path.lexists(self.history_path):
            return rows
        try:
            lines = read_file(self.history_path).decode().splitlines()
        except (OSError, ValueError) as error:
            raise RunError(
                f"cannot read {self.history_path} ({in_a_line(error)}); nothing was changed. Bring the file back, or move the folder "
                "away to train anew"
            ) from error
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line a crash cut short
                break
            if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
                break
            rows.append(row)
        return rows

    def check_history(self, before_epoch: int) -> None:
        """Raises RunError where a row is missing of an epoch that the checkpoint to go on from has behind it."""
        found = [row["epoch"] for row in self.history() if row["epoch"] < before_epoch]
        if found != (wanted := list(range(1, before_epoch))):
            raise RunError(
                f"{self.history_path} has epochs {str(found)[1:60].rstrip(']') or 'none'} in it, and the checkpoint has {len(wanted)} "
                "behind it; nothing was changed. Bring the file back, or move the folder away to train anew"
            )

    def truncate_history(self, before_epoch: int) -> None:
        """Keep the rows of epochs below `before_epoch`: those that the checkpoint to go on from knows of."""
        rows = [row for row in self.history() if row["epoch"] < before_epoch]
        write_text(self.history_path, "".join(json.dumps(row) + "\n" for row in rows))


def damage(content: bytes) -> str | None:
    """What proves that a checkpoint's bytes are no longer those written, None for whole ones. Raises ValueError for other files.

    A run writes archives: what neither begins nor ends as one was something else, unless the disk has lost it.
    """
    # Seconds, with every network of timm's; most look at a folder's names alone.
    from gkl.models.checkpoint_files import archive_damage

    if not content.strip(b"\0"):
        return "it is empty" if not content else "all of it is zeros"
    if not content.startswith(b"PK") and not zipfile.is_zipfile(BytesIO(content)):
        raise ValueError("it is no archive of torch.save")
    return archive_damage(BytesIO(content))
