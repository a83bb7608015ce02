"""How a run tells about itself: a progress bar on a terminal, plain lines elsewhere, and a small file for whoever started it."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

LINES_EVERY_SECONDS = 30.0
PROGRESS_EVERY_SECONDS = 1.0


class Console:
    """Progress of one run on standard error and in progress.json of its folder, from process 0 alone."""

    def __init__(self, title: str, *, enabled: bool, folder: Path | None = None) -> None:
        self.title, self.enabled, self.folder = title, enabled, folder
        self.live = enabled and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        self.done_at_start: int | None = None
        self.started = self.printed = time.monotonic()
        self.noted = 0.0

    def step(self, epoch: int, epochs: int, step: int, steps: int) -> None:
        """Progress after a step, with the time left at the pace since this process started."""
        done, total = (epoch - 1) * steps + step, epochs * steps
        if self.done_at_start is None:
            self.done_at_start, self.started = done, time.monotonic()
        if not self.enabled:
            return
        where, left = f"epoch {epoch}/{epochs}, step {step}/{steps}", self._left(done, total)
        if time.monotonic() - self.noted > PROGRESS_EVERY_SECONDS:
            self.note(where, left)
        if self.live:
            if self.bar is None:
                self.bar = tqdm(total=total, initial=done, desc=self.title, unit="step", leave=False)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.printed > LINES_EVERY_SECONDS:
            self.printed = time.monotonic()
            print(f"{self.title}: {progress(where, left)}", file=sys.stderr)

    def phase(self, where: str, left: float) -> None:
        """Progress of what follows the training, with the seconds left of it."""
        if self.enabled:
            self.note(where, left)
        self.say(progress(where, left))

    def note(self, where: str, left: float | None) -> None:
        """Leave word in the run's folder of where it is and how many seconds it has left; losing it loses nothing."""
        self.noted = time.monotonic()
        if self.folder is not None:
            temporary = self.folder / f".progress.{os.getpid()}.tmp"
            with suppress(OSError):
                temporary.write_text(json.dumps({"where": where, "left": left}), encoding="utf-8")
                os.replace(temporary, self.folder / "progress.json")

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch's numbers in one line."""
        if not self.enabled:
            return
        values = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "epoch" and isinstance(v, float))
        line = f"{self.title}: epoch {row['epoch']}: {values}"
        if self.live:
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)

    def say(self, message: str) -> None:
        """One plain line."""
        if self.enabled:
            print(f"{self.title}: {message}", file=sys.stderr)

    def warn(self, message: str) -> None:
        """One line about something that is not as it should be."""
        self.say(f"warning: {message}")

    def close(self) -> None:
        """Take the bar down."""
        if self.bar is not None:
            self.bar.close()

    def _left(self, done: int, total: int) -> float | None:
        passed = done - (self.done_at_start or 0)
        return (time.monotonic() - self.started) / passed * (total - done) if passed > 0 else None


def progress(where: str, left: float | None) -> str:
    """Where a run is and the time it has left, in one phrase."""
    return where if left is None else f"{where}, {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
