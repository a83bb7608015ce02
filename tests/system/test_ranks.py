"""Every method on two processes against one, and stopped in the middle of an epoch against not stopped: the same weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkl.data.digits import digits
from gkl.data.memory import ImageData
from gkl.distributed import rank
from tests.processes import on_processes
from tests.system.test_fidelity import TinyNet
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build

EXPERIMENTS = (
    "at/c100_awp",
    "at/c100_lbgat_awp",
    "at/c100_las_at",
    "at/c100_dajat",
    "at/c100_dm_gkl",
    "at/c100_dkl",
)


def scans() -> ImageData:
    """200 training and 40 test scans: an epoch takes a second."""
    data = digits()
    return ImageData("scans", 10, data.train_images[:200], data.train_labels[:200], data.test_images[:40],
                     data.test_labels[:40], data.class_names)  # fmt: skip


def make_task(
    experiment: str, root: Path, *own: str, precision: str = "float64", device: str = "cpu"
) -> Training:
    overrides = [
        f"precision={precision}",
        "batch_size=32",
        "bn_groups=2",
        "channels_last=false",
        "epochs=4",
        *own,
    ]
    if experiment == "at/c100_las_at":
        overrides += ["method.interval=2", "method.steps=[2,3]"]
    if experiment == "at/c100_awp":
        overrides += ["model.normalisation=null"]
    config = compose("train", [f"experiment={experiment}", "scale=smoke", *overrides])
    if "selection" in config:
        config["selection"]["steps"] = 3
    if "generated" in config:
        config["generated"] |= {"images": 100, "root": str(root)}
        config["held_out"] = 0.1
    torch.manual_seed(5)
    model = TinyNet().double() if precision == "float64" else TinyNet()
    return build(config, data=scans(), model=model, device=torch.device(device))


def train(task: Training, epoch: int, steps: range) -> None:
    task.start_epoch(epoch)
    for step in steps:
        task.train_step(epoch, step)


def ended(task: Training) -> dict[str, Any]:
    row = task.end_epoch(2)
    return copy.deepcopy({"row": row, **task.state_dict()})


def twice(task: Training) -> list[dict[str, Any]]:
    """The whole state within the epoch, as a checkpoint takes it, and after its end."""
    train(task, 2, range(2))
    within = copy.deepcopy(task.state_dict())
    train(task, 2, range(2, 3))
    return [within, ended(task)]


def worker(folder: str, groups: str) -> None:
    for number, experiment in enumerate(EXPERIMENTS):
        task = make_task(experiment, Path(folder), groups)
        states = twice(task)
        if rank() == 0:
            torch.save(states, f"{folder}/{number}.pt")


def assert_equal(one: Any, other: Any, where: str, **tolerance: float) -> None:
    if isinstance(one, Tensor):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, **tolerance, msg=lambda m: f"{where}: {m}")
        else:
            assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}", **tolerance)
    elif isinstance(one, list | tuple):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{number}]", **tolerance)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-8), where
    else:
        assert one == other, where


@pytest.mark.long  # every method on two processes
@pytest.mark.parametrize("groups", ["bn_groups=2", "bn_groups=1"])  # one each, and one that both share
def test_two_processes_equal_one(groups: str, tmp_path: Path) -> None:
    on_processes(worker, tmp_path, str(tmp_path), groups)
    for number, experiment in enumerate(EXPERIMENTS):
        task = make_task(experiment, tmp_path, groups)
        shared = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert_equal(twice(task), shared, experiment, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_stopped_within_an_epoch_and_gone_on(experiment: str, tmp_path: Path) -> None:
    task = make_task(experiment, tmp_path)
    train(task, 1, range(2))
    task.end_epoch(1)
    train(task, 2, range(1))
    torch.save(task.state_dict(), tmp_path / "checkpoint.pt")
    train(task, 2, range(1, 4))
    resumed = make_task(experiment, tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    train(resumed, 2, range(1, 4))
    assert_equal(ended(task), ended(resumed), experiment, rtol=0, atol=0)
