"""Runs the missing cells of a plan through a launcher: teachers first, fail fast or carry on, nothing lost when killed."""

import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from trainers.errors import Interrupted, RunError
from trainers.loop.console import LINES_EVERY_SECONDS, duration, progress
from trainers.runs.paths import run_folder
from trainers.runs.plan import Cell
from trainers.signals import signals


class Job(Protocol):
    """A run that was started."""

    cell: Cell
    log: Path

    @property
    def state(self) -> str:
        """running, or what it waits for."""

    def poll(self) -> int | None:
        """0 done, another number failed, None not ended."""

    def stop(self) -> None:
        """Ask it to save and end; returns at once."""

    def wait(self) -> None:
        """Until it has ended, where that is this process's to wait for."""


class Launcher(Protocol):
    """Starts runs somewhere."""

    outlive: bool  # whether they go on when this process ends
    poll_seconds: float

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError for what cannot be started."""

    def concurrent_runs(self, devices: int) -> int:
        """How many runs go at the same time unless told."""

    def start(self, cells: Sequence[Cell], concurrent_runs: int) -> Sequence[Job]:
        """Start the runs."""


def run_all(
    cells: Sequence[Cell],
    launcher: Launcher,
    jobs: int,
    *,
    keep_going: bool,
    minutes: float | None = None,
    then: Callable[[Cell], Sequence[Cell]] = lambda done: (),
) -> list[str]:
    """Run every cell, `jobs` at the same time, and after each those that `then` names; returns a line for each that failed.

    minutes: after which the runs that are at work save themselves, and no other begins. Unless keep_going, the first that fails stops the others and raises RunError. Stopped runs have saved themselves, those of a
    launcher that outlives this process go on: the same command finds either. Each run writes to run.log in its folder.
    """
    waiting, running = list(cells), list[Job]()
    board = Board(len(cells), jobs)
    failures: list[str] = []
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with signals() as stopped, board:
        try:
            while (waiting or running) and not stopped() and time.monotonic() < end:
                ready = startable(waiting, running)[: jobs - len(running)]
                if ready:
                    waiting = [c for c in waiting if c not in ready]
                    started = launcher.start(ready, jobs)
                    running += started
                    for job in started:
                        board.started(job)
                elif not running:  # what they wait for has failed
                    failures += [f"{name(cell)} was not started: its teacher failed" for cell in waiting]
                    break
                board.show(running, len(waiting))
                time.sleep(launcher.poll_seconds)
                for job in [job for job in running if job.poll() is not None]:
                    running.remove(job)
                    if job.poll() == 0:
                        more = then(job.cell)
                        waiting += more
                        board.ended(job, len(more))
                        continue
                    if stopped():  # a Ctrl-C reached it, too
                        break
                    failures.append(_failure(job))
                    if not keep_going:
                        raise RunError(failures[0])
                    board.line(failures[-1])
            if signum := stopped():
                raise Interrupted(_stopped(signal.Signals(signum).name, board, launcher), signum)
            if time.monotonic() >= end and (waiting or running):
                if not launcher.outlive:
                    _stop(running)
                board.line(_stopped(f"the end of {minutes:g} minutes", board, launcher))
        except BaseException:
            if not launcher.outlive:
                _stop(running)
            raise
    return failures


def startable(waiting: Sequence[Cell], running: Sequence[Job]) -> list[Cell]:
    """Runs whose teachers are done, and whose folder no other holds: measurements of one training go one after the other."""
    held = {run_folder(job.cell.config).path for job in running}
    found = []
    for cell in waiting:
        folder = run_folder(cell.config).path
        if folder not in held and all(one.recorded for one in cell.before):
            held.add(folder)
            found.append(cell)
    return found


def _failure(job: Job) -> str:
    row, seed = job.cell.row, job.cell.config["seed"]
    return f"row {row}, seed {seed} failed: {_last_line(job.log)} (whole log: {job.log})"


def _stopped(by: str, board: "Board", launcher: Launcher) -> str:
    kept = "goes on in the queue" if launcher.outlive else "saved where it was"
    return (
        f"stopped by {by} with {board.done} of {board.total} runs done; each of the others that had begun "
        f"{kept}. The same command goes on from there"
    )


def _stop(running: Sequence[Job]) -> None:
    for job in running:
        job.stop()
    for job in running:
        job.wait()


class Board:
    """What a person sees of many runs: a live table on a terminal, lines elsewhere."""

    def __init__(self, total: int, concurrent_runs: int) -> None:
        self.total, self.concurrent_runs, self.done = total, concurrent_runs, 0
        self.began: dict[Path, float] = {}
        self.took: list[float] = []
        self.printed = time.monotonic()
        console = Console(file=sys.stdout)
        self.live = (
            Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        )

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def started(self, job: Job) -> None:
        """A run was started, or found in the queue."""
        self.began[job.log] = time.monotonic()
        self.line(f"[{self.done}/{self.total}] started {name(job.cell)}; log {job.log}")

    def ended(self, job: Job, more: int) -> None:
        """A run is done, and so many more follow from it."""
        self.done, self.total = self.done + 1, self.total + more
        self.took.append(time.monotonic() - self.began[job.log])
        took = duration(self.took[-1])
        self.line(f"[{self.done}/{self.total}] done {name(job.cell)} in {took}: {_last_line(job.log)}")

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def show(self, running: Sequence[Job], waiting: int) -> None:
        """Where each run is and the time left, now on a terminal and every half minute elsewhere."""
        left = self._left(running, waiting)
        head = f"{self.done} of {self.total} runs done, {len(running)} started, {waiting} to come" + (
            f"; about {duration(left)} left" if left is not None else ""
        )
        if self.live:
            table = Table("run", "seed", "state", "where", "left", "since", title=head, title_justify="left")
            for job in running:
                where, seconds = self._where(job)
                since = duration(time.monotonic() - self.began[job.log])
                cells = (job.cell.row, str(job.cell.config["seed"]), job.state, where)
                table.add_row(*cells, duration(seconds) if seconds is not None else "–", since)
            self.live.update(table)
        elif time.monotonic() - self.printed > LINES_EVERY_SECONDS:
            self.printed = time.monotonic()
            each = "; ".join(
                f"{job.cell.row} seed {job.cell.config['seed']}: {progress(*self._where(job)) or job.state}"
                for job in running[:8]
            )
            print(f"{head}. {each}", flush=True)

    def _where(self, job: Job) -> tuple[str, float | None]:
        """What the run said last of itself."""
        path = job.log.with_name("progress.json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found["where"], found["left"]
        except (OSError, ValueError, KeyError):
            return "", None

    def _left(self, running: Sequence[Job], waiting: int) -> float | None:
        """Seconds until all are done, at the mean time of those that were; None before the first."""
        if not self.took:
            return None
        mean = statistics.mean(self.took)
        now = time.monotonic()
        begun = sum(max(mean - (now - self.began[job.log]), self._where(job)[1] or 0.0) for job in running)
        return (begun + waiting * mean) / min(self.concurrent_runs, len(running) + waiting)


def name(cell: Cell) -> str:
    """A run in a line."""
    return f"{cell.row} seed {cell.config['seed']} ({cell.config['experiment']})"


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
