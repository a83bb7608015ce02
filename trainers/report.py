"""How a run tells about itself: a progress bar on a terminal, plain lines elsewhere, wandb as a mirror."""

import sys
import time
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

LINES_EVERY_SECONDS = 30.0


class Console:
    """Progress of one run on standard error, from process 0 alone."""

    def __init__(self, title: str, *, enabled: bool, mirror: "Mirror | None" = None) -> None:
        self.title, self.enabled, self.mirror = title, enabled, mirror
        self.live = enabled and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        self.done_at_start: int | None = None
        self.started = self.printed = time.monotonic()

    def step(self, epoch: int, epochs: int, step: int, steps: int) -> None:
        """Progress after a step, with the time left at the pace since this process started."""
        done, total = (epoch - 1) * steps + step, epochs * steps
        if self.done_at_start is None:
            self.done_at_start, self.started = done, time.monotonic()
        if not self.enabled:
            return
        if self.live:
            if self.bar is None:
                self.bar = tqdm(total=total, initial=done, desc=self.title, unit="step", leave=False)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.printed > LINES_EVERY_SECONDS:
            self.printed = time.monotonic()
            print(
                f"{self.title}: epoch {epoch}/{epochs}, step {step}/{steps}{self._left(done, total)}",
                file=sys.stderr,
            )

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch's numbers in one line, and to the mirror."""
        if not self.enabled:
            return
        values = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "epoch" and isinstance(v, float))
        line = f"{self.title}: epoch {row['epoch']}: {values}"
        if self.live:
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)
        if self.mirror:
            self.mirror.log(row)

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

    def _left(self, done: int, total: int) -> str:
        passed = done - (self.done_at_start or 0)
        if passed < 1:
            return ""
        return f", {duration((time.monotonic() - self.started) / passed * (total - done))} left"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Mirror:
    """A wandb run that repeats what history.jsonl and the record say. Its trouble never reaches the training."""

    def __init__(
        self,
        *,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        name: str,
        group: str,
        run_id: str,
        config: dict[str, Any],
        folder: Path,
        warn: Any,
    ) -> None:
        """run_id: derived from the run's identity, so that a resumed run continues the same wandb run."""
        self.warn, self.run = warn, None
        try:
            import wandb

            self.run = wandb.init(
                mode=mode,
                project=project,
                entity=entity,
                name=name,
                group=group,
                id=run_id,
                resume="allow",
                config=config,
                dir=folder,
                settings=wandb.Settings(silent=True, init_timeout=60),
            )
            self.run.define_metric("epoch")
            self.run.define_metric("*", step_metric="epoch")
        except Exception as error:  # the mirror is never worth a run
            self._give_up(error)

    def log(self, row: dict[str, Any]) -> None:
        """Repeat one line of the history."""
        try:
            if self.run:
                self.run.log(row)
        except Exception as error:
            self._give_up(error)

    def close(self, summary: dict[str, Any]) -> None:
        """Repeat the record's metrics and end the wandb run."""
        try:
            if self.run:
                self.run.summary.update(summary)
                self.run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        self.warn(
            f"wandb is out ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "training goes on, history.jsonl has everything"
        )
