"""Everything that is kept and read back, gone through once: another ingredient, another entry; the same ones, the same.

What is kept where: AutoAttack's batches (outputs/.../autoattack), a teacher's logits (outputs/teacher_logits), digests of folders
(outputs/digests), the index of tars and the shards of generated pictures (beside the pictures), checkpoints (outputs), records
(results/runs), figures (results/figures), and what a process remembers of records and files that it has read.
"""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gkl.data.ade20k import ade20k
from gkl.data.content import content
from gkl.data.generated import generated, open_shards, prepared
from gkl.data.memory import ImageData
from gkl.data.preparing import prepare
from gkl.data.stores import Shards
from gkl.evaluation.autoattack import evaluate
from tests.trainers.methods.test_distillation import make_task
from tests.trainers.runs.test_records_and_tables import record
from trainers.reports.figures import is_sealed, sealed
from trainers.runs.compose import compose
from trainers.runs.identity import config_hash, training_hash
from trainers.runs.paths import run_folder
from trainers.runs.records import is_whole, read_records, write_record

ROOT = Path(__file__).resolve().parents[2]


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".looks.npy")}


class Net(nn.Module):
    """Four classes by brightness of the corners; `slope` is a plain number that no state dict knows."""

    def __init__(self, slope: float = 0.1, weight: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(12, 4)
        self.slope = slope
        nn.init.normal_(self.head.weight, std=weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(self.head(x.flatten(1) - 0.5), self.slope)


def test_autoattack_s_batches(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def attacked(**change: Any) -> int:
        net, data = (
            Net(change.pop("slope", 0.1), change.pop("weight", 1.0)).eval(),
            change.pop("data", images),
        )
        before = entries(tmp_path)
        labels = change.pop("labels", torch.arange(6) % 4)
        evaluate(
            net, data, labels, folder=tmp_path, device=torch.device("cpu"),
            **{"epsilon": 0.1, "norm": "linf", "version": "screen", "batch_size": 6, "seed": 0, **change},
        )  # fmt: skip
        return len(entries(tmp_path) - before)

    assert attacked() == 1 and attacked() == 0
    for change in (
        {"slope": 0.2}, {"weight": 2.0}, {"data": images.flip(0)}, {"labels": torch.arange(6) % 3}, {"epsilon": 0.2},
        {"norm": "l2"}, {"seed": 1}, {"batch_size": 3},
    ):  # fmt: skip
        assert attacked(**change) == 1, change
        assert attacked(**change) == 0, change


def test_a_teacher_s_logits(tmp_path: Path) -> None:
    def new(*overrides: str) -> int:
        before = entries(tmp_path / "logits") if (tmp_path / "logits").exists() else set()
        make_task("kd", tmp_path, f"teacher.cache={tmp_path / 'logits'}", *overrides)
        return len(entries(tmp_path / "logits") - before)

    assert new() == 1 and new() == new("seed=1") == new("augment.flip=0.2") == 0
    for other in ("augment.padding=2", "batch_size=16", "precision=float32"):
        assert new(other) == 1 and new(other) == 0, other


@pytest.mark.parametrize("harm", ["content", "name", "gone"])
def test_digests_of_folders(harm: str, tmp_path: Path) -> None:
    pictures, kept = tmp_path / "pictures", tmp_path / "kept"
    (pictures / "cat").mkdir(parents=True)
    (pictures / "cat/1.png").write_bytes(b"one")
    (pictures / "cat/2.png").write_bytes(b"two")
    before = content(pictures, kept)
    assert content(pictures, kept) == before
    stat = (pictures / "cat/1.png").stat()
    if harm == "content":  # of equal size, and its time set back
        (pictures / "cat/1.new").write_bytes(b"eno")
        os.utime(pictures / "cat/1.new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (pictures / "cat/1.new").rename(pictures / "cat/1.png")
    elif harm == "name":
        (pictures / "cat/1.png").rename(pictures / "cat/3.png")
    else:
        (pictures / "cat/1.png").unlink()
    assert content(pictures, kept) != before


def test_the_index_of_tars(tmp_path: Path) -> None:
    """By name, size, time and inode: of equal size, and with its time set back, a shard that was written anew is another one."""

    def shard(first: str) -> None:
        made = tmp_path / "made"  # written beside it and put in its place
        with tarfile.open(made, "w") as tar:
            for name, data in (
                (f"{first}.png", b"first"),
                (f"{first}.cls", b"1"),
                ("z.png", b"other"),
                ("z.cls", b"0"),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        made.rename(tmp_path / "train-0.tar")

    shard("a")
    before = (tmp_path / "train-0.tar").stat()
    assert Shards(tmp_path).names == ["train-0/a.png", "train-0/z.png"]
    kept = (tmp_path / "gkl-shards.npz").stat().st_mtime_ns
    assert (
        Shards(tmp_path).labels.tolist() == [1, 0]
        and (tmp_path / "gkl-shards.npz").stat().st_mtime_ns == kept
    )
    shard("b")
    os.utime(tmp_path / "train-0.tar", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (tmp_path / "train-0.tar").stat().st_size == before.st_size
    assert Shards(tmp_path).names == ["train-0/b.png", "train-0/z.png"]
    data = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(
        data.replace(b"z.png", b"y.png").replace(b"z.cls", b"y.cls")
    )  # in its place, not beside it
    with pytest.raises(
        ValueError, match=r"train-0\.tar is damaged"
    ):  # whose checksums are of the names before
        Shards(tmp_path)


def test_generated_pictures(tmp_path: Path) -> None:
    def part(path: Path, value: int) -> Path:
        np.savez(path, image=np.full((8, 4, 4, 3), value, np.uint8), label=np.arange(8) % 2)
        return path

    one = part(tmp_path / "a.npz", 1)
    prepare([one], tmp_path / "shards")
    size, before = one.stat().st_size, prepared(str(tmp_path / "shards"))
    part(one, 2)
    assert one.stat().st_size == size
    with pytest.raises(FileExistsError, match="holds shards of other parts"):  # of one name and size
        prepare([one], tmp_path / "shards")
    prepare([one], tmp_path / "others")
    after = prepared(str(tmp_path / "others"))
    assert (
        before != after == open_shards(str(tmp_path / "others"), 2).sha256[:16]
        and prepared("nowhere") is None
    )
    pictures = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    data = ImageData("d", 2, pictures, torch.arange(4) % 2, pictures, torch.arange(4) % 2, ("a", "b"))
    with pytest.raises(ValueError, match=f"are {after}, and this run is of {before}"):
        generated(data, source="edm", name="others", root=str(tmp_path), content=before)
    stand_in = generated(data, source="class_gaussian", name="g", root=str(tmp_path), images=4)
    other = ImageData("d", 2, pictures + 9, torch.arange(4) % 2, pictures, torch.arange(4) % 2, ("a", "b"))
    assert (
        generated(other, source="class_gaussian", name="g", root=str(tmp_path), images=4).sha256
        != stand_in.sha256
    )


def test_generated_pictures_of_another_content_are_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKL_DATA", str(tmp_path))

    def hashed(value: int) -> str:
        name = f"c{value}.npz"
        np.savez(tmp_path / name, image=np.full((8, 4, 4, 3), value, np.uint8), label=np.arange(8) % 2)
        folder = tmp_path / "generated" / "cifar100_50m"
        if folder.exists():
            folder.rename(tmp_path / f"before{value}")
        prepare([tmp_path / name], folder)
        compose_again()
        return config_hash(compose("train", ["experiment=at/c100_dm_gkl"]))

    def compose_again() -> None:
        from trainers.runs import compose as module

        module._composed.cache_clear()  # another process

    first = hashed(1)
    assert hashed(2) != first and hashed(1) == first


@pytest.mark.parametrize(
    ("change", "trains"),
    [
        ("loss.gamma=0.3", True), ("epochs=11", True), ("model.name=wrn_16_2", True), ("augment.padding=2", True),
        ("evaluation.images=4", False), ("evaluation.epsilon=0.01", False),
    ],
)  # fmt: skip
def test_checkpoints_and_records(change: str, trains: bool) -> None:
    base, other = (
        compose("train", ["experiment=at/c100_basic_gkl", "scale=smoke", *more]) for more in ([], [change])
    )
    assert config_hash(base) != config_hash(other)
    assert (
        (training_hash(base) != training_hash(other))
        == (run_folder(base).path != run_folder(other).path)
        == trains
    )


def test_figures() -> None:
    content = b"\x89PNG....\x00\x00\x00\x00IEND\xaeB`\x82"
    made = sealed(content, "key", "png")
    assert is_sealed(made, "key", "png") and not is_sealed(made, "another key", "png")
    assert not is_sealed(made.replace(b"....", b"..,."), "key", "png")


def test_which_classes_label_maps_hold(tmp_path: Path) -> None:
    """Noted by their content, the number of classes and the coding."""

    def told(high: int, **settings: Any) -> str | None:
        for part in ("training", "validation"):
            for folder, pixels in (
                ("images", np.zeros((8, 8, 3), np.uint8)),
                ("annotations", np.tile(np.uint8([1, high]), (8, 4))),
            ):
                (tmp_path / "scenes" / folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "scenes" / folder / part / "0.png")
        root = tmp_path / "scenes"
        return ade20k(str(root), content=content(root), cache=str(tmp_path / "kept"), **settings).noticed

    first = told(3, classes=4)
    assert first is not None and "2 of data.classes=4, counted from 0 (1, 3)" in first
    assert told(3, classes=4) == first
    assert "(1, 2)" in str(told(4, classes=4)) and "(0, 2)" in str(told(3, classes=4, coding="from_zero"))
    assert "3 of data.classes=5" in str(told(3, classes=5)) and told(3, classes=4) == first
    assert told(2, classes=2) is None


def test_what_a_process_remembers_of_records(tmp_path: Path) -> None:
    path = write_record(tmp_path, record(30.0))
    assert is_whole(path)
    text = path.read_text()
    path.write_text(text[:-2] + "  ")  # of equal size
    assert not is_whole(path) and read_records(tmp_path).damaged
    path.write_text(text)
    assert is_whole(path) and json.loads(text)["metrics"] == read_records(tmp_path)[0]["metrics"]


def test_every_module_that_keeps_something_is_looked_at_here() -> None:
    """A cache added later has to be put above, too: these write to a disk."""
    words = (
        "np.memmap(",
        "np.savez(",
        "os.replace(",
        ".rename(",
        "atomically(",
        "write_text(",
        "save_state(",
    )
    files = [path for folder in ("gkl", "trainers") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if any(word in path.read_text() for word in words)}
    assert found == {
        "gkl/evaluation/kept.py", "trainers/methods/teacher_logits.py", "gkl/data/content.py", "gkl/data/generated.py", "gkl/data/preparing.py",
        "trainers/reports/figures.py", "trainers/runs/records.py", "trainers/runs/paths.py", "trainers/loop/folder.py",
        "gkl/data/stores.py", "gkl/data/ade20k.py",
        "gkl/data/cifar.py", "gkl/models/published.py",   # downloads, checked by the digests that their publishers give
        "gkl/own.py",                    # a person's own network, by its content
        "gkl/data/digit_questions.py", "gkl/data/shape_questions.py",
        "gkl/data/digits.py",            # a package's scans as files, whole or not at all
        "trainers/loop/engine.py", "trainers/runs/run.py", "trainers/loop/console.py", "trainers/runs/wandb_mirror.py", "trainers/runs/launchers/slurm.py",
        # a run's own weights, batch that was not finite, progress and queue numbers, in its folder
        "trainers/runs/processes.py",    # a file by which machines see that they share a disk, removed at once
        "trainers/reports/page.py", "trainers/reports/render.py", "trainers/reports/release.py", "trainers/reports/sweep.py",
        "trainers/reports/ledger.py",
        # drawn anew from the records each time
        "gkl/evaluation/vqa_files.py", "gkl/evaluation/mmbench.py",   # answers in the benchmarks' own forms, to be sent in
        "trainers/files.py", "gkl/atomic.py",
    }  # fmt: skip
