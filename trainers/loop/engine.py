"""The loop that every task shares: epochs, checkpoints, exact resume, history, interruption.

    fit(task, epochs=200, folder=RunFolder(path), checkpoint_minutes=10, report=report)

A task does the mathematics; the engine knows none of it. Started again with the same arguments, `fit` goes on from the
last whole checkpoint and ends in the same weights as if it had never been stopped.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from gkl.data.workers import not_handed_over
from gkl.distributed import agree, all_reduce, rank, world_size
from trainers.errors import Interrupted, NotBegun, RunError, in_a_line
from trainers.files import save_state
from trainers.loop.folder import RunFolder
from trainers.signals import signals

SAVE = -1  # what a process asks for when a checkpoint is due
# The last of these that any process asks for is heeded; 0 asks for nothing.
REQUESTS = (0, SAVE, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Task(Protocol):
    """One kind of training. Every method runs on every process."""

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch."""

    def start_epoch(self, epoch: int) -> None:
        """Set what is constant within epoch 1, 2, ...; also called when resuming inside it."""

    def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
        """One update. Returns this process's shares of the scalars to log: their sum over processes is the value.

        Raises NotBegun where it has changed nothing.
        """

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """What follows the last step. Returns values for the history, equal on every process."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on. Called on every process, saved by process 0."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict, on any number of processes."""

    def describe_batch(self, epoch: int, step: int) -> dict[str, Any]:
        """What is needed to look at the batch again: written beside the run when a loss is not finite."""


class Report(Protocol):
    """Where a run tells how it goes."""

    def step(self, epoch: int, epochs: int, step: int, steps: int) -> None:
        """After each step."""

    def epoch(self, row: dict[str, Any]) -> None:
        """After each epoch, with its line of the history."""

    def warn(self, message: str) -> None:
        """Something worth a line."""


def fit(task: Task, *, epochs: int, folder: RunFolder, checkpoint_minutes: float, report: Report) -> float:
    """Train to the end of `epochs` and return the seconds spent, those before a restart included.

    A checkpoint is written after each epoch, every `checkpoint_minutes` within one, and on SIGTERM, SIGINT and SIGHUP.
    Raises Interrupted after a signal, RunError for a loss that is not finite, for a picture that cannot be read and for a checkpoint
    that is not this run's.
    """
    loop = _Loop(task, epochs, folder, 60 * checkpoint_minutes, report)
    first = loop.resume()
    with signals() as signal_received:
        for epoch in range(first.epoch, epochs + 1):
            task.start_epoch(epoch)
            begun = epoch == first.epoch
            sums = dict(first.sums) if begun else {}
            loop.steps(epoch, first.step if begun else 0, sums, signal_received)
            row = {
                "epoch": epoch,
                **{name: value / task.steps_in(epoch) for name, value in sums.items()},
                **task.end_epoch(epoch),
                "seconds": round(time.monotonic() - loop.started, 3),
            }
            if rank() == 0:
                folder.append_history(row)
            report.epoch(row)
            loop.save(Position(epoch + 1))
            if epoch < epochs and (signum := agree(signal_received())):
                raise Interrupted(_how_to_go_on(epoch + 1, 0, signum), signum)
    # From here on none is remembered: what follows is stopped by a signal at once.
    if signum := agree(signal_received()):
        raise Interrupted(_how_to_go_on(epochs + 1, 0, signum, end=True), signum)
    return time.monotonic() - loop.started


class _Loop:
    """A training on its way: its steps, what of them is not yet read back, and when it was saved."""

    def __init__(self, task: Task, epochs: int, folder: RunFolder, every: float, report: Report) -> None:
        """every: seconds between checkpoints."""
        self.task, self.epochs, self.folder, self.every, self.report = task, epochs, folder, every, report
        self.unread = deque[tuple[int, Callable[[], tuple[dict[str, float], int]]]]()

    def resume(self) -> "Position":
        """Where to begin: at the last whole checkpoint, which is loaded, or at the start."""
        position = Position()
        checkpoint = self.folder.load_checkpoint(self.report.warn)
        if checkpoint is not None:
            position = self._taken(checkpoint)
        self.folder.check_history(before_epoch=position.epoch)
        mark = position.epoch << 32 | position.step
        if agree(mark) != -agree(-mark):
            raise RunError(
                f"the processes of this run see different checkpoints in {self.folder.path}; outputs must lie on a file system "
                "that all machines share: set GKL_OUTPUTS to one"
            )
        if rank() == 0:
            self.folder.truncate_history(before_epoch=position.epoch)
        self.saved = time.monotonic()
        self.started = self.saved - position.seconds
        return position

    def _taken(self, checkpoint: Any) -> "Position":
        """Put the task where a checkpoint stands. Raises RunError for one that is not this run's."""
        try:
            position = Position.of(checkpoint, self.epochs, self.task.steps_in)
            self.task.load_state_dict(checkpoint["task"])
        except RunError:
            raise
        except Exception as error:  # what another network's state makes torch raise
            raise RunError(
                f"the checkpoint in {self.folder.path} is whole, but this run cannot go on from it ({in_a_line(error)}); nothing was "
                "changed. Bring the run's own checkpoints back, or move that folder away to train anew"
            ) from error
        return position

    def steps(
        self, epoch: int, first: int, sums: dict[str, float], signal_received: Callable[[], int]
    ) -> None:
        """The steps of an epoch from `first` on, their values added to sums. Raises Interrupted after a signal."""
        steps = self.task.steps_in(epoch)
        for step in range(first, steps):
            scalars = self.step(epoch, step, sums)
            self.report.step(epoch, self.epochs, step + 1, steps)
            due = time.monotonic() - self.saved > self.every
            own = signal_received() or (SAVE if due else 0)
            self.unread.append((step, gather(scalars, own)))
            # A step behind, so that the device has work while its values are waited for.
            common = self.read(epoch, sums, but=1)
            request = own if world_size() == 1 else common
            if request and step + 1 < steps:
                # No checkpoint holds what a value that is not finite has come to.
                request = max(request, self.read(epoch, sums), key=REQUESTS.index)
                self.save(Position(epoch, step + 1, sums=sums))
                if request != SAVE:
                    raise Interrupted(_how_to_go_on(epoch, step + 1, request), request)
        self.read(epoch, sums)

    def step(self, epoch: int, step: int, sums: dict[str, float]) -> dict[str, Tensor]:
        """A step. Raises RunError for one that cannot begin on any process, with a checkpoint of those before it."""
        try:
            return self.task.train_step(epoch, step)
        except NotBegun as error:
            self.read(epoch, sums)
            self.save(Position(epoch, step, sums=sums))
            raise RunError(
                f"{error}; checkpoint saved before epoch {epoch}, step {step}. With the same pictures the same command goes on from there"
            ) from error
        except RuntimeError as error:  # which may have come in the midst of an update
            if words := not_handed_over(error):
                raise RunError(f"{words}; the last checkpoint is intact") from error
            raise

    def read(self, epoch: int, sums: dict[str, float], but: int = 0) -> int:
        """Add the values of the steps taken to the sums, of all but the last `but`; returns what was asked for after them."""
        asked = 0
        while len(self.unread) > but:
            step, arrived = self.unread.popleft()
            values, request = arrived()
            for name, value in values.items():
                if not math.isfinite(value):
                    raise RunError(_not_finite(self.task, self.folder, epoch, step, name, value))
                sums[name] = sums.get(name, 0.0) + value
            asked = max(asked, request, key=REQUESTS.index)
        return asked

    def save(self, position: "Position") -> None:
        """Write a checkpoint to go on from."""
        position.seconds = time.monotonic() - self.started
        state = {"task": self.task.state_dict(), "position": vars(position)}
        if rank() == 0:
            self.folder.save_checkpoint(state)
        self.saved = time.monotonic()


class Position:
    """How far a run has come: the next step to take, the seconds spent, the epoch's sums of scalars so far."""

    def __init__(
        self, epoch: int = 1, step: int = 0, seconds: float = 0.0, sums: dict[str, float] | None = None
    ) -> None:
        self.epoch, self.step, self.seconds, self.sums = epoch, step, seconds, sums or {}

    @classmethod
    def of(cls, checkpoint: Any, epochs: int, steps_in: Callable[[int], int]) -> "Position":
        """Where a checkpoint stands in a run of so many epochs. Raises ValueError for none of such a run. steps_in: an epoch."""
        if not isinstance(checkpoint, dict) or not {"task", "position"} <= checkpoint.keys():
            keys = ", ".join(map(str, list(checkpoint)[:3])) if isinstance(checkpoint, dict) else ""
            raise ValueError(
                f"it holds a {type(checkpoint).__name__} ({keys or 'empty'}), not a run's task and position"
            )
        kept = checkpoint["position"]
        whole = (
            isinstance(kept, dict) and kept.keys() == vars(cls()).keys() and isinstance(kept["sums"], dict)
        )
        if not whole or not all(
            isinstance(n, int | float) for n in (*kept["sums"].values(), kept["seconds"])
        ):
            raise ValueError(f"its position is {str(kept)[:80]}")
        epoch, step = kept["epoch"], kept["step"]
        known = isinstance(epoch, int) and 1 <= epoch <= epochs
        within = known and isinstance(step, int) and 0 <= step < steps_in(epoch)
        if not within and (epoch, step) != (epochs + 1, 0):
            of = f" of {steps_in(epoch)} steps" if known else ""
            raise ValueError(f"it stands before epoch {epoch}, step {step}, of {epochs} epochs{of}")
        return cls(**kept)


def gather(shares: dict[str, Tensor], request: int) -> Callable[[], tuple[dict[str, float], int]]:
    """Sums over processes of named scalars, and the last of their requests, on their way from the device in one message.

    Calling the result waits for them.
    """
    values = torch.stack([value.detach().double().reshape(()) for value in shares.values()])
    asking = values.new_zeros(len(REQUESTS))
    if request:
        asking[REQUESTS.index(request)] = 1.0
    values = all_reduce(torch.cat([values, asking]))
    on_cpu = values.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event() if values.is_cuda else None
    if arrived is not None:
        arrived.record(torch.cuda.current_stream(values.device))

    def read() -> tuple[dict[str, float], int]:
        if arrived is not None:
            arrived.synchronize()  # this copy alone: a plain read waits for all that was launched after it, too
        found = on_cpu.tolist()
        asked = [r for r, count in zip(REQUESTS, found[len(shares) :], strict=True) if count]
        return dict(zip(shares, found, strict=False)), asked[-1] if asked else 0

    return read


def _how_to_go_on(epoch: int, step: int, signum: int, end: bool = False) -> str:
    name, where = signal.Signals(signum).name, "the evaluation" if end else f"epoch {epoch}, step {step}"
    return f"stopped by {name} before {where}; checkpoint saved. The same command goes on from there"


def _not_finite(task: Task, folder: RunFolder, epoch: int, step: int, name: str, value: float) -> str:
    path = folder.path / f"not_finite_epoch{epoch}_step{step}.pt"
    where = f"its batch is in {path}"
    if rank() == 0:
        try:
            save_state(path, task.describe_batch(epoch, step))
        except RunError:
            where = f"its batch could not be written to {path}"
    return (
        f"{name} became {value} in epoch {epoch}, step {step}; {where}, the last checkpoint is intact. "
        "Lower the learning rate or the loss weights"
    )
