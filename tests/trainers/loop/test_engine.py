"""The engine and the run folder in this process: stopped anywhere, damaged, full, refused."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainers.errors import Interrupted, RunError
from trainers.files import write_atomically
from trainers.loop.engine import fit
from trainers.loop.folder import RunFolder
from trainers.signals import signals


class Counting:
    """A task whose state is a sum that depends on every step in order."""

    steps_per_epoch = 4

    def steps_in(self, epoch: int) -> int:
        return self.steps_per_epoch

    def __init__(self) -> None:
        self.value, self.log = torch.zeros((), dtype=torch.float64), list[tuple[int, int]]()

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
        assert self.epoch == epoch
        self.value = self.value * 1.1 + epoch * 10 + step
        self.log.append((epoch, step))
        return {"loss": self.value}

    def end_epoch(self, epoch: int) -> dict[str, float]:
        return {"value": float(self.value)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value = state["value"]

    def describe_batch(self, epoch: int, step: int) -> dict[str, int]:
        return {"step": step}


class Quiet:
    """A report that remembers warnings and can send a signal after a step."""

    def __init__(
        self, stop_after: tuple[int, int] | None = None, signum: signal.Signals = signal.SIGTERM
    ) -> None:
        self.warnings, self.stop_after, self.signum = list[str](), stop_after, signum

    def step(self, epoch: int, epochs: int, step: int, steps: int) -> None:
        if self.stop_after == (epoch, step):
            os.kill(os.getpid(), self.signum)

    def epoch(self, row: dict) -> None:
        pass

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def run(folder: Path, report: Quiet, epochs: int = 3) -> Counting:
    task = Counting()
    fit(task, epochs=epochs, folder=RunFolder(folder), checkpoint_minutes=1e9, report=report)
    return task


def rows(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(folder).history()]


@pytest.mark.parametrize("stop", [(1, 1), (1, 4), (2, 3), (3, 2), (3, 4)])
def test_stopped_after_any_step_the_history_is_whole(stop: tuple[int, int], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Quiet())
    before = "stopped by SIGTERM before " + (
        "the evaluation; checkpoint saved" if stop == (3, 4) else "epoch"
    )
    with pytest.raises(Interrupted, match=before) as error:
        run(tmp_path / "stopped", Quiet(stop))
    assert error.value.signum == signal.SIGTERM
    resumed = run(tmp_path / "stopped", Quiet())
    assert resumed.value.equal(whole.value) and rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    done = (stop[0] - 1) * 4 + stop[1]
    assert resumed.log == whole.log[done:]
    assert run(tmp_path / "stopped", Quiet()).log == []  # nothing left to do


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path) -> None:
    whole = run(tmp_path, Quiet())
    last = tmp_path / "checkpoints/last.pt"
    last.write_bytes(last.read_bytes()[:200])
    report = Quiet()
    resumed = run(tmp_path, report)
    assert resumed.value.equal(whole.value) and resumed.log == whole.log[8:]
    assert len(report.warnings) == 1 and "last.pt is damaged" in report.warnings[0]
    assert len(rows(tmp_path)) == 3
    last.unlink()  # killed between the two renames
    assert run(tmp_path, Quiet()).value.equal(whole.value)


def test_a_terminal_s_hangup_saves_as_a_scheduler_s_signal_does(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Quiet())
    with pytest.raises(
        Interrupted, match="stopped by SIGHUP before epoch 2, step 3; checkpoint saved"
    ) as error:
        run(tmp_path / "stopped", Quiet((2, 3), signal.SIGHUP))
    assert error.value.signum == signal.SIGHUP
    assert run(tmp_path / "stopped", Quiet()).value.equal(whole.value)


def test_under_nohup_a_hangup_is_still_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert len(run(tmp_path, Quiet((2, 3), signal.SIGHUP)).log) == 12
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_at_once_and_is_no_exception_to_be_caught(tmp_path: Path) -> None:
    with (
        pytest.raises(Interrupted, match="stopped at once by a second SIGINT") as error,
        signals() as received,
    ):
        os.kill(os.getpid(), signal.SIGINT)
        assert received() == signal.SIGINT
        with suppress(Exception):
            os.kill(os.getpid(), signal.SIGINT)
    assert error.value.signum == signal.SIGINT


def test_a_half_written_history_line_is_dropped(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", Quiet(), epochs=2)
    with open(tmp_path / "a/history.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    run(tmp_path / "a", Quiet(), epochs=3)
    run(tmp_path / "b", Quiet(), epochs=3)
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(whole.log) == 8


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A file size limit makes the kernel refuse the write, as a full disk does."""
    folder = RunFolder(tmp_path)
    folder.save_checkpoint({"epoch": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            RunError,
            match=r"cannot write .*last\.pt: File too large; the files before it are intact.*GKL_OUTPUTS",
        ) as error:
            folder.save_checkpoint({"epoch": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert folder.load_checkpoint(lambda message: None) == {"epoch": 1}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda p: p.write_text("first"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left on device"):
        write_atomically(path, fail)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunError, match="cannot write"):
        write_atomically(path / "below", lambda p: p.write_text("x"))


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    class Exploding(Counting):
        def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
            scalars = super().train_step(epoch, step)
            return {**scalars, "robust": torch.tensor(float("inf") if (epoch, step) == (2, 1) else 0.0)}

    with pytest.raises(RunError, match="robust became inf in epoch 2, step 1; its batch is in"):
        fit(Exploding(), epochs=3, folder=RunFolder(tmp_path), checkpoint_minutes=1e9, report=Quiet())
    assert torch.load(tmp_path / "not_finite_epoch2_step1.pt", weights_only=True) == {"step": 1}
    assert len(rows(tmp_path)) == 1


def test_a_value_that_is_not_finite_is_named_where_its_batch_cannot_be_written(tmp_path: Path) -> None:
    class Exploding(Counting):
        def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
            return {**super().train_step(epoch, step), "robust": torch.tensor(float("nan"))}

    (tmp_path / "not_finite_epoch1_step0.pt").mkdir()
    with pytest.raises(
        RunError, match="robust became nan in epoch 1, step 0; its batch could not be written"
    ):
        fit(Exploding(), epochs=3, folder=RunFolder(tmp_path), checkpoint_minutes=1e9, report=Quiet())


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def folder_for_history(folder: Path) -> None:
    (folder / "history.jsonl").unlink()
    (folder / "history.jsonl").mkdir()


@pytest.mark.parametrize("fault", [gone, folder_for_history])
def test_a_history_that_cannot_be_written_any_more_is_one_line(
    fault: Callable[[Path], None], tmp_path: Path
) -> None:
    class Losing(Counting):
        def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
            if (epoch, step) == (2, 3):
                fault(tmp_path / "run")
            return super().train_step(epoch, step)

    with pytest.raises(RunError, match=r"cannot write .*history.jsonl: (No such|Is a)") as error:
        fit(Losing(), epochs=3, folder=RunFolder(tmp_path / "run"), checkpoint_minutes=1e9, report=Quiet())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [(2, 1), (2, 4)])
def test_no_checkpoint_holds_what_a_value_that_is_not_finite_has_come_to(
    wrong: tuple[int, int], tmp_path: Path
) -> None:
    """A value is read a step late; a signal right after its step saves nothing, nor does an epoch's end."""

    class Exploding(Counting):
        def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
            scalars = super().train_step(epoch, step)
            return {**scalars, "robust": torch.tensor(float("nan") if (epoch, step + 1) == wrong else 0.0)}

    with pytest.raises(RunError, match=f"robust became nan in epoch 2, step {wrong[1] - 1}; its batch is in"):
        fit(Exploding(), epochs=3, folder=RunFolder(tmp_path), checkpoint_minutes=1e9, report=Quiet(wrong))
    kept = RunFolder(tmp_path).load_checkpoint(lambda message: None)
    assert kept is not None and kept["position"]["epoch"] == 2 and kept["position"]["step"] == 0


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"cannot write in the output folder .*GKL_OUTPUTS"),
        RunFolder(tmp_path / "file/run").locked(),
    ):
        pass


def test_a_worker_that_is_killed_is_a_line(tmp_path: Path) -> None:
    """torch raises it wherever the run stands, so that nothing is saved of that step."""

    class Killed(Counting):
        def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
            if step == 2:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
            return super().train_step(epoch, step)

    with pytest.raises(
        RunError, match="is killed by signal.*or set workers=0; the last checkpoint is intact$"
    ):
        fit(Killed(), epochs=2, folder=RunFolder(tmp_path), checkpoint_minutes=10, report=Quiet())
