"""A run whose pictures are damaged, empty, gone or enormous: one line with the path, what was computed saved, and no bit of it changed."""

import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gkl.distributed import rank
from tests.gkl.data.test_files import shards
from tests.processes import on_processes
from tests.system.test_ranks import assert_equal
from tests.trainers.loop.test_engine import Quiet
from trainers.errors import ConfigError, NotBegun, RunError
from trainers.loop.accuracy import correct_flags
from trainers.loop.engine import fit
from trainers.loop.folder import RunFolder
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build, check
from trainers.runs.targets import instantiate


def write(root: Path, seed: int = 0) -> Path:
    """Four classes of 8 training and 2 test pictures each."""
    generator = np.random.default_rng(seed)
    for part, count in (("train", 8), ("val", 2)):
        for label in "abcd":
            for number in range(count):
                file = root / part / label / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return root


def config(root: Path, *more: str) -> dict[str, Any]:
    """Without content: data whose bytes no configuration knows, as ImageNet's."""
    words = ["experiment=kd/in_vanilla", "model=wrn_10_1", "scale=smoke", "data=image_files", f"data.root={root}", "data.image_size=16",
             "data.resize=16", "data.content=null", "batch_size=8", "epochs=2", "device=cpu", "logger=off", *more]  # fmt: skip
    return compose("train", words)


def made(root: Path, *more: str) -> Training:
    found = config(root, *more)
    check(found, 1)
    torch.manual_seed(5)
    data = instantiate(found["data"])
    model = instantiate(found["model"], num_classes=data.num_classes)
    return build(found, data=data, model=model, device=torch.device("cpu"))


def trained(task: Training, folder: Path) -> dict[str, Any]:
    fit(task, epochs=2, folder=RunFolder(folder), checkpoint_minutes=1e9, report=Quiet())
    return task.state_dict()


def bomb() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


HARM = {
    "damaged": (b"no picture", r"picture train/c/5\.png is damaged \(it is no picture that is read here\)"),
    "empty": (b"", r"picture train/c/5\.png is damaged \(it is empty\)"),
    "a huge header": (bomb(), r"picture train/c/5\.png says that it has more than 178,956,970 pixels"),
    "gone": (None, r"picture train/c/5\.png cannot be read \(No such file or directory\)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return trained(made(write(folder / "pictures")), folder / "run")


@pytest.mark.parametrize(
    ("fault", "workers"),
    [
        ("damaged", 2),
        ("a huge header", 1),
        *(pytest.param(fault, 0, marks=pytest.mark.long) for fault in ("empty", "gone")),
    ],
)
def test_a_picture_ends_a_run_with_a_line_and_what_was_computed_is_saved(
    fault: str, workers: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    root = write(tmp_path / "pictures")
    task = made(root, f"workers={workers}")
    data, message = HARM[fault]
    picture = root / "train/c/5.png"
    before = picture.read_bytes()
    picture.unlink() if data is None else picture.write_bytes(data)
    with pytest.raises(RunError, match=message) as raised:
        trained(task, tmp_path / "run")
    step = int(str(raised.value).split("checkpoint saved before epoch 1, step ")[1].split(".")[0])
    assert "\n" not in str(raised.value) and 0 <= step < 4
    kept = RunFolder(tmp_path / "run").load_checkpoint(print)["position"]
    assert (kept["epoch"], kept["step"]) == (1, step)
    picture.write_bytes(before)
    assert_equal(trained(made(root), tmp_path / "run"), uninterrupted, fault, rtol=0, atol=0)
    assert len((tmp_path / "run/history.jsonl").read_text().splitlines()) == 2


def worker(root: str, folder: str) -> None:
    try:
        said, state = "", trained(made(Path(root), "workers=0", "bn_groups=2"), Path(folder) / "run")
    except RunError as error:
        said, state = str(error), {}
    torch.save({"said": said, "state": state}, f"{folder}/{rank()}.pt")


@pytest.mark.long  # six processes
def test_two_processes_stop_before_the_same_step(tmp_path: Path) -> None:
    """One of them cannot read a picture; both say which, and go on from there to the same bits."""
    root = write(tmp_path / "pictures")

    def both(name: str) -> list[dict[str, Any]]:
        (tmp_path / name).mkdir(exist_ok=True)
        on_processes(worker, tmp_path / name, str(root), str(tmp_path / name))
        return [torch.load(tmp_path / name / f"{rank}.pt", weights_only=True) for rank in range(2)]

    whole = both("whole")
    picture = root / "train/c/5.png"
    before = picture.read_bytes()
    picture.write_bytes(b"")
    first, second = (found["said"] for found in both("harmed"))
    assert first == second and "picture train/c/5.png is damaged (it is empty)" in first and "\n" not in first
    step = int(first.split("checkpoint saved before epoch 1, step ")[1].split(".")[0])
    kept = RunFolder(tmp_path / "harmed/run").load_checkpoint(print)["position"]
    assert (kept["epoch"], kept["step"]) == (1, step)
    picture.write_bytes(before)
    for found, wanted in zip(both("harmed"), whole, strict=True):
        assert found["said"] == "" and wanted["state"]
        assert_equal(found["state"], wanted["state"], "two processes", rtol=0, atol=0)


def test_the_steps_before_it_are_in_the_checkpoint(tmp_path: Path) -> None:
    """The picture of the last batch of the first epoch."""
    root = write(tmp_path / "pictures")
    task = made(root)
    task.batches.start_epoch(1)
    last = task.data.train.names[int(task.batches.drawn(1, 3)[0])].decode()  # type: ignore[attr-defined]
    (root / last).unlink()
    with pytest.raises(
        RunError, match=rf"picture {last} .* checkpoint saved before epoch 1, step 3\. With the same pictures"
    ):
        trained(task, tmp_path / "run")
    checkpoint = RunFolder(tmp_path / "run").load_checkpoint(print)
    assert checkpoint["position"]["step"] == 3 and checkpoint["position"]["sums"]["loss/labels"] > 0


def test_a_test_picture_is_named_too(tmp_path: Path) -> None:
    root = write(tmp_path / "pictures")
    for workers in (0, 1):
        task = made(root, f"workers={workers}")
        (root / "val/b/1.png").write_bytes(b"")
        with pytest.raises(
            RunError, match=r"picture val/b/1\.png is damaged \(it is empty\).*What was finished is kept"
        ) as raised:
            correct_flags(task.model, task.data, torch.device("cpu"), workers)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)


def test_a_step_that_cannot_begin_is_asked_for_again(tmp_path: Path) -> None:
    root = write(tmp_path / "pictures")
    task = made(root, "workers=1")
    task.start_epoch(1)
    first = task.data.train.names[int(task.batches.drawn(1, 1)[0])].decode()  # type: ignore[attr-defined]
    away = shutil.move(root / first, tmp_path / "away.png")
    task.train_step(1, 0)
    with pytest.raises(NotBegun, match=first):
        task.train_step(1, 1)
    shutil.move(away, root / first)
    for step in range(1, 4):
        task.train_step(1, step)


# --- data that changed --------------------------------------------------------------------------------------------------


def test_going_on_with_other_data_is_refused(tmp_path: Path) -> None:
    """Where no configuration knows the data's bytes the checkpoint knows its digest."""
    root = write(tmp_path / "pictures")
    task = made(root)
    (root / "train/c/5.png").rename(tmp_path / "away.png")
    with pytest.raises(RunError, match="checkpoint saved before"):
        trained(task, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        RunError,
        match=r"pictures is no longer the data that this run was trained on \(sha256 \w{12}, now \w{12}\)",
    ):
        trained(made(root), tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "away.png").rename(root / "train/c/5.png")
    trained(made(root), tmp_path / "run")


@pytest.mark.parametrize("form", ["folder", "zip", "shards"])
def test_a_frozen_run_refuses_pictures_that_changed(form: str, tmp_path: Path) -> None:
    root = write(tmp_path / "pictures")

    def packed() -> Path:
        if form == "folder":
            return root
        if form == "zip":
            return Path(shutil.make_archive(str(tmp_path / "packed"), "zip", root))
        shutil.rmtree(tmp_path / "tars", ignore_errors=True)
        for label, name in enumerate("abcd"):
            for part in ("train", "val"):
                (root / part / name).rename(root / part / f"n0{label}")
        made_of = shards(root, tmp_path / "tars")
        for label, name in enumerate("abcd"):
            for part in ("train", "val"):
                (root / part / f"n0{label}").rename(root / part / name)
        return made_of

    frozen = compose("train", ["experiment=kd/in_vanilla", "model=wrn_10_1", "scale=smoke", "data=image_files", f"data.root={packed()}",
                               "data.image_size=16", "data.resize=16"])  # fmt: skip
    assert len(instantiate(frozen["data"]).train_labels) == 32
    (root / "train/a/0.png").write_bytes((root / "train/b/0.png").read_bytes())
    packed()
    with pytest.raises(
        ConfigError,
        match=r"the pictures at .* have changed since this run was started \(content \w{16}, was \w{16}\)",
    ):
        instantiate(frozen["data"])
