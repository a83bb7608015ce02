"""What a run finds in its folder when it starts again: damaged, unreadable, of another run, and a signal meanwhile."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainers.loop.test_engine import Counting, Quiet, run
from trainers.command import run_main
from trainers.errors import RunError
from trainers.loop.engine import Position, fit
from trainers.loop.folder import RunFolder
from trainers.loop.training import load_optimizer
from trainers.signals import heeded


def bytes_of(folder: Path) -> dict[str, bytes | None]:
    """Everything that lies in a folder; None for what is no readable file."""
    found = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in found}


def refused(folder: Path, message: str) -> None:
    """The run says so in one line, and nothing in its folder is another than before."""
    before = bytes_of(folder)
    with pytest.raises(RunError, match=message) as error:
        run(folder, Quiet())
    assert "\n" not in str(error.value) and "nothing was changed" in str(error.value)
    assert bytes_of(folder) == before


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    """One bit of the one tensor."""
    content, value = bytearray(path.read_bytes()), torch.load(path, weights_only=True)["task"]["value"]
    content[content.index(value.numpy().tobytes())] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [emptied, zeroed, cut, flipped])
def test_proven_damage_is_passed_over_and_never_takes_the_place_of_what_is_good(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    whole, last, previous = run(tmp_path, Quiet()), *RunFolder(tmp_path)._checkpoints()
    damage(last)
    folder = RunFolder(tmp_path)
    kept, good = folder.load_checkpoint(lambda message: None), previous.read_bytes()
    assert kept["position"]["epoch"] == 3
    folder.save_checkpoint(kept)
    assert previous.read_bytes() == good  # killed now, there are two good ones
    damage(last)
    report = Quiet()
    assert run(tmp_path, report).value.equal(whole.value) and len(report.warnings) == 1
    damage(last), damage(previous)
    report = Quiet()
    again = run(tmp_path, report)
    assert again.value.equal(whole.value) and again.log == whole.log
    assert len(report.warnings) == 3 and "no whole checkpoint is left" in report.warnings[-1]


def test_whichever_bit_is_flipped_it_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_checkpoint({"value": torch.arange(3.0)})
    (path,) = (tmp_path / "checkpoints").iterdir()
    content, noticed = path.read_bytes(), 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            found = folder.load_checkpoint(lambda message: None)
        except RunError:
            found = None
        noticed += found is None
        assert found is None or found["value"].equal(torch.arange(3.0)), place
    assert noticed > 30


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def gone_disk_instead(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("not mounted"))


def text_instead(path: Path) -> None:
    path.write_text("weights")


@pytest.mark.parametrize(
    "fault", [folder_instead, pipe_instead, loop_instead, gone_disk_instead, text_instead]
)
@pytest.mark.parametrize("which", [0, 1])
def test_what_cannot_be_read_stops_the_run_and_changes_nothing(
    fault: Callable[[Path], None], which: int, tmp_path: Path
) -> None:
    run(tmp_path, Quiet(), epochs=2)
    paths = RunFolder(tmp_path)._checkpoints()
    fault(paths[which])
    if which == 1:
        emptied(paths[0])  # where the other is good it is gone on from
    refused(tmp_path, f"cannot read the checkpoint .*{paths[which].name}")


def test_a_read_that_fails_is_no_damage(tmp_path: Path) -> None:
    """A whole disk's EIO, from the kernel: the memory of a process at an address where nothing is."""
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(os.open("/proc/self/mem", os.O_RDONLY), 1, 0)
    run(tmp_path, Quiet(), epochs=2)
    last, _ = RunFolder(tmp_path)._checkpoints()
    last.unlink()
    last.symlink_to("/proc/self/mem")
    refused(tmp_path, "cannot read the checkpoint .*Input/output error")


class Other(Counting):
    """Of another architecture."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        torch.nn.Linear(2, 2).load_state_dict(state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, r"holds a dict \(empty\), not a run's task and position"),
        ({"conv.weight": torch.zeros(2)}, r"holds a dict \(conv.weight\)"),
        ({"task": {}, "position": {"epoch": 2}}, "its position is {'epoch': 2}"),
        ({"task": {}, "position": {"epoch": 2, "step": 0, "seconds": "1", "sums": {}}}, "its position is"),
        (
            {"task": {}, "position": vars(Position(9))},
            "stands before epoch 9, step 0, of 3 epochs",
        ),
        ({"task": {}, "position": vars(Position(0))}, "stands before epoch 0"),
        (
            {"task": {}, "position": vars(Position(2, 4))},
            "stands before epoch 2, step 4, of 3 epochs of 4 steps",
        ),
        ({"task": {}, "position": vars(Position(2, 1))}, "KeyError: 'value'"),
        ({"task": [], "position": vars(Position(2, 1))}, "TypeError"),
    ],
)
def test_a_whole_file_that_is_not_this_run_s_state_is_one_line(
    content: object, message: str, tmp_path: Path
) -> None:
    run(tmp_path, Quiet(), epochs=1)
    torch.save(content, tmp_path / "checkpoints/last.pt")
    refused(tmp_path, f"is whole, but this run cannot go on from it .*{message}")


def test_another_architecture_s_state_is_one_line(tmp_path: Path) -> None:
    run(tmp_path, Quiet(), epochs=1)
    before = bytes_of(tmp_path)
    with pytest.raises(RunError, match="cannot go on from it .*Missing key") as error:
        fit(Other(), epochs=3, folder=RunFolder(tmp_path), checkpoint_minutes=1e9, report=Quiet())
    assert "\n" not in str(error.value) and bytes_of(tmp_path) == before


def test_another_run_s_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    """Of the same network and data, so that all of it fits."""
    for name, task in (("kl/seed0", Counting()), ("gkl/seed0", Counting())):
        fit(task, epochs=1, folder=RunFolder(tmp_path / name, name), checkpoint_minutes=1e9, report=Quiet())
    shutil.copytree(tmp_path / "kl/seed0", tmp_path / "gkl/seed0", dirs_exist_ok=True)
    before = bytes_of(tmp_path)
    own = RunFolder(tmp_path / "gkl/seed0", "gkl/seed0")
    with pytest.raises(RunError, match="is of another run, kl/seed0; nothing was changed"):
        fit(Counting(), epochs=3, folder=own, checkpoint_minutes=1e9, report=Quiet())
    assert bytes_of(tmp_path) == before
    unnamed = torch.load(own.path / "checkpoints/last.pt", weights_only=True)
    torch.save({key: unnamed[key] for key in ("task", "position")}, own.path / "checkpoints/last.pt")
    fit(Counting(), epochs=3, folder=own, checkpoint_minutes=1e9, report=Quiet())  # of version 0.1


def test_another_optimizer_s_state_is_told() -> None:
    def adam(shape: int, **settings: float) -> torch.optim.AdamW:
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.ones(shape)
        optimizer = torch.optim.AdamW([parameter], **settings)
        optimizer.step()
        return optimizer

    found = adam(2).state_dict()
    load_optimizer(adam(2), found)
    with pytest.raises(ValueError, match=r"exp_avg has shape \(2,\), its parameter \(3,\)"):
        load_optimizer(adam(3), found)
    del found["param_groups"][0]["betas"]
    with pytest.raises(ValueError, match="its optimizer has no betas"):
        load_optimizer(adam(2), found)


def test_a_file_that_holds_code_is_not_loaded_and_stays(tmp_path: Path) -> None:
    run(tmp_path, Quiet(), epochs=1)
    torch.save({"task": Quiet(), "position": {}}, tmp_path / "checkpoints/last.pt")
    refused(tmp_path, "cannot read the checkpoint .*UnpicklingError")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (b"\xff\xfe\x00", "cannot read .*UnicodeDecodeError"),
        (b"", "has epochs none in it, and the checkpoint has 2 behind it"),
        (b'{"epoch": 2}\n', "has epochs 2 in it"),
        (b'{"epoch": 1}\nnonsense\n{"epoch": 2}\n', "has epochs 1 in it"),
        (b'{"epoch": 1}\n{"epoch": 1}\n{"epoch": 2}\n', "has epochs 1, 1, 2 in it"),
        (b'{"epoch": 1}\n{"loss": 1}\n', "has epochs 1 in it"),
        (b"[1]\n[2]\n", "has epochs none in it"),
    ],
)
def test_a_history_that_misses_an_epoch_is_one_line(history: bytes, message: str, tmp_path: Path) -> None:
    run(tmp_path, Quiet(), epochs=2)
    (tmp_path / "history.jsonl").write_bytes(history)
    refused(tmp_path, message)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_a_checkpoint_is_loaded_is_heeded(signum: signal.Signals, tmp_path: Path) -> None:
    class Slow(Counting):
        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            os.kill(os.getpid(), signum)
            super().load_state_dict(state)

    run(tmp_path, Quiet(), epochs=2)
    before, handlers = bytes_of(tmp_path), {s: signal.getsignal(s) for s in heeded()}
    sys_argv, sys.argv = sys.argv, ["train"]
    try:
        code = run_main(
            lambda _: fit(
                Slow(), epochs=3, folder=RunFolder(tmp_path), checkpoint_minutes=1e9, report=Quiet()
            )
        )
    finally:
        sys.argv = sys_argv
        for s, handler in handlers.items():
            signal.signal(s, handler)
    assert code == 128 + signum and bytes_of(tmp_path) == before
