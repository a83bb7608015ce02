"""Generated pictures: parts that the test writes, streamed into shards and read back."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gkl.data import preparing
from gkl.data.digits import digits
from gkl.data.generated import class_gaussian, generated, open_shards
from gkl.data.preparing import ROWS, alone, prepare
from tests.processes import FORKED


def part(
    path: Path, count: int, seed: int, packed: bool = False, **change: np.ndarray
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays = {
        "image": generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8),
        "label": generator.integers(0, 10, count),
        **change,
    }
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    return arrays


@pytest.mark.long  # parts of every size, packed and not
def test_parts_come_back_in_any_order_and_number(tmp_path: Path) -> None:
    count = ROWS + 17  # one whole stretch of rows and a rest
    one = part(tmp_path / "a.npz", count, 0)
    two = part(tmp_path / "b.npz", 50, 1, packed=True, label=np.arange(50, dtype=np.int32) % 10)
    prepare([tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "shards")
    pictures = open_shards(str(tmp_path / "shards"), num_classes=10, verify=True)
    assert len(pictures) == count + 50 and len(pictures.shards) == 2
    assert all(isinstance(shard, np.memmap) for shard in pictures.shards)
    index = torch.tensor([count + 3, 0, ROWS, count - 1, count, 5, 5])
    images, labels = pictures.take(index)
    whole = np.concatenate([one["image"], two["image"]])
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), whole[index.numpy()])
    assert labels.tolist() == np.concatenate([one["label"], two["label"]])[index.numpy()].tolist()
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64

    before = (tmp_path / "shards" / "images_000.npy").stat().st_mtime_ns
    prepare([tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "shards")  # done already: nothing is written
    assert (tmp_path / "shards" / "images_000.npy").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="holds shards of other parts"):
        prepare([tmp_path / "b.npz"], tmp_path / "shards")
    other = tmp_path / "same"
    prepare([tmp_path / "a.npz", tmp_path / "b.npz"], other)
    assert open_shards(str(other), 10).sha256 == pictures.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((9, 4, 4), np.uint8)}, r"image must be \(N, H, W, 3\) uint8, got \(9, 4, 4\)"),
        ({"image": np.zeros((9, 4, 4, 3), np.float32)}, "uint8, got .* float32"),
        ({"label": np.zeros(8, np.int64)}, r"label must be \(9,\) integers, got \(8,\)"),
        ({"label": np.zeros(9, np.float64)}, "integers, got .* float64"),
        ({"label": np.array([None] * 9, dtype=object)}, "plain numbers"),
        ({"image": np.asfortranarray(np.zeros((9, 4, 4, 3), np.uint8))}, "C order"),
    ],
)
def test_bad_parts_are_named_and_leave_nothing(tmp_path: Path, change: dict, message: str) -> None:
    part(tmp_path / "bad.npz", 9, 0, **change)
    with pytest.raises(ValueError, match=r"bad\.npz.*" + message):
        prepare([tmp_path / "bad.npz"], tmp_path / "shards")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.npz"]


def marked(path: Path, name: str, flags: int = 0, method: int | None = None) -> None:
    """Write into a member's two headers that it is encrypted, or packed by another method."""
    data = bytearray(path.read_bytes())
    for magic, flag_at, name_at in ((b"PK\3\4", 6, 30), (b"PK\1\2", 8, 46)):
        at = -1
        while (at := data.find(magic, at + 1)) >= 0:
            if data[at + name_at : at + name_at + len(name)] == name.encode():
                data[at + flag_at] |= flags
                if method is not None:
                    data[at + flag_at + 2] = method
    path.write_bytes(data)


def header_of(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def lying(path: Path, shape: tuple[int, ...]) -> None:
    """A part whose pictures' header claims more, or less, than there is."""
    part(path, 9, 0)
    with zipfile.ZipFile(path) as archive:
        labels = archive.read("label.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", header_of(shape) + bytes(9 * 48))
        archive.writestr("label.npy", labels)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "encrypted": (lambda p: marked(p, "image.npy", flags=1), "image.npy is encrypted"),
    "encrypted labels": (lambda p: marked(p, "label.npy", flags=1), "label.npy is encrypted"),
    "unknown compression": (lambda p: marked(p, "image.npy", method=97), r"image.npy is packed in an unknown way \(97\)"),
    "negative labels": (lambda p: part(p, 9, 0, label=np.arange(9) - 1), r"labels must lie in 0\.\.9, got -1\.\.7"),
    "labels of no class": (lambda p: part(p, 9, 0, label=np.arange(9) + 2), r"labels must lie in 0\.\.9, got 2\.\.10"),
    "a cut member": (lambda p: lying(p, (10, 4, 4, 3)), "damaged: image.npy has 432 bytes of values, and its header says 480"),
    "a huge header": (lambda p: lying(p, (10**12, 10**5, 10**5, 3)), "its header says 30,000,000,000,000,000,000,000"),
    "a negative header": (lambda p: lying(p, (-9, 4, 4, 3)), "not empty, got"),
    "no labels": (lambda p: np.savez(p, image=np.zeros((9, 4, 4, 3), np.uint8)), "no npz file of image and label"),
    "another shape": (lambda p: part(p, 9, 0, image=np.zeros((9, 8, 8, 3), np.uint8)), r"different shapes: \[\(4, 4, 3\), \(8, 8, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_part_is_found_before_anything_is_written(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it comes after good ones of many GB."""
    harm, message = FAULTS[fault]
    part(tmp_path / "good.npz", 9, 0)
    part(tmp_path / "bad.npz", 9, 1)
    harm(tmp_path / "bad.npz")
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda *_, **__: pytest.fail("a shard was begun"))
    with pytest.raises(ValueError, match=message) as raised:
        prepare([tmp_path / "good.npz", tmp_path / "bad.npz"], tmp_path / "shards", num_classes=10)
    assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.npz", "good.npz"]


def test_damage_within_the_pictures_is_found_as_they_are_read(tmp_path: Path) -> None:
    for packed in (False, True):
        part(tmp_path / "bad.npz", 500, 0, packed=packed)
        data = bytearray((tmp_path / "bad.npz").read_bytes())
        data[len(data) // 2] ^= 0xFF
        (tmp_path / "bad.npz").write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.npz is no npz file of image and label, or damaged"):
            prepare([tmp_path / "bad.npz"], tmp_path / "shards")
        assert [p.name for p in tmp_path.iterdir()] == ["bad.npz"]


def test_without_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part(tmp_path / "a.npz", 9, 0)
    needed = 9 * 48 + 9 * 8
    left = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: left)
    with pytest.raises(
        ValueError, match=rf"has {needed - 1:,} bytes left, and these parts need {needed:,}; make room"
    ):
        prepare([tmp_path / "a.npz"], tmp_path / "shards")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def killed_within_its_rows(source: Path, folder: Path) -> None:
    rows = preparing._rows

    def killed(*arguments):
        yield from rows(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    preparing._rows = killed
    prepare([source], folder)


def test_what_a_killed_one_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Killed within its rows, while another folder's is at work."""
    part(tmp_path / "a.npz", 20, 0)
    process = FORKED.Process(target=killed_within_its_rows, args=(tmp_path / "a.npz", tmp_path / "shards"))
    process.start(), process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.glob(".shards.*.tmp")
    assert any(left.iterdir())
    (tmp_path / ".shards.v2.1.tmp").mkdir()  # another folder's, "shards.v2"
    prepare([tmp_path / "a.npz"], tmp_path / "shards")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".shards.v2.1.tmp", "a.npz", "shards"]


def test_two_at_once_wait_for_each_other(tmp_path: Path) -> None:
    part(tmp_path / "a.npz", 20, 0)
    given = [tmp_path / "a.npz"], tmp_path / "shards"
    others = [FORKED.Process(target=prepare, args=given) for _ in range(2)]
    with alone(tmp_path / "shards"):
        for other in others:
            other.start()
        time.sleep(0.5)
        prepare(*given, locked=True)
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "shards"]


def test_missing_truncated_and_changed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no part of generated pictures at"):
        prepare([tmp_path / "none.npz"], tmp_path / "shards")
    with pytest.raises(
        FileNotFoundError, match=r"fetch DM-AT's npz parts and run python scripts/prepare\.py"
    ):
        open_shards(str(tmp_path / "shards"), 10)
    part(tmp_path / "a.npz", 100, 0)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.npz is no npz file of image and label, or damaged"):
        prepare([tmp_path / "a.npz"], tmp_path / "shards")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("image.npy", b"")
    with pytest.raises(ValueError, match=r"b\.npz"):
        prepare([tmp_path / "b.npz"], tmp_path / "shards")

    (tmp_path / "a.npz").write_bytes(whole)
    prepare([tmp_path / "a.npz"], tmp_path / "shards")
    with pytest.raises(ValueError, match=r"has labels \d\.\.9, the data set 5 classes"):
        open_shards(str(tmp_path / "shards"), 5)
    images = np.load(tmp_path / "shards" / "images_000.npy", mmap_mode="r+")
    images[7, 0, 0, 0] ^= 1
    images.flush()
    open_shards(str(tmp_path / "shards"), 10)
    with pytest.raises(ValueError, match=r"is not what was prepared \(sha256\)"):
        open_shards(str(tmp_path / "shards"), 10, verify=True)
    (tmp_path / "shards" / "index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        open_shards(str(tmp_path / "shards"), 10)


def test_a_part_is_never_held_in_memory(tmp_path: Path) -> None:
    """A part of 120 MB, stored and packed, in a process that may take 60 MB more than it has after the imports."""
    images = np.zeros((40_000, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(40_000) % 251
    labels = np.arange(40_000) % 10
    np.savez(tmp_path / "stored.npz", image=images, label=labels)
    np.savez_compressed(tmp_path / "packed.npz", image=images, label=labels)
    del images
    program = f"""
from pathlib import Path
from gkl.data.generated import prepare
import threading, os, time
anonymous = []
def watch():
    while True:
        lines = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
        anonymous.append(int(lines["RssAnon"].split()[0]))
        time.sleep(0.002)
first = int(dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())["RssAnon"].split()[0])
threading.Thread(target=watch, daemon=True).start()
prepare([Path({str(tmp_path / "stored.npz")!r}), Path({str(tmp_path / "packed.npz")!r})], Path({str(tmp_path / "shards")!r}))
print(max(anonymous) - first)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 1024, done.stdout  # kB; two stretches of rows of 25 MB each, and zlib's
    taken, _ = open_shards(str(tmp_path / "shards"), 10, verify=True).take(torch.tensor([300, 40_300]))
    assert taken[:, 0, 0, 0].tolist() == [300 % 251, 300 % 251]


def test_the_stand_in_is_drawn_from_the_datas_own_pictures(tmp_path: Path) -> None:
    data = digits()
    images, labels = class_gaussian(data, 2000)
    assert images.shape == (2000, 8, 8, 3) and np.bincount(labels).tolist() == [200] * 10
    for label in range(10):
        mine = data.train_images[data.train_labels == label].float().mean(0).permute(1, 2, 0).numpy()
        assert (
            np.abs(images[labels == label].mean(0) - mine).mean() < 8
        )  # grey levels; clipping moves the mean a little
    one = generated(data, source="class_gaussian", name="cifar100_50m", root=str(tmp_path), images=100)
    again = generated(data, source="class_gaussian", name="cifar100_50m", root=str(tmp_path), images=100)
    assert one.sha256 == again.sha256 and one.name.startswith("class_gaussian_") and len(one) == 100
    with pytest.raises(FileNotFoundError, match="no generated pictures in"):
        generated(data, source="edm", name="cifar100_50m", root=str(tmp_path))
    part(tmp_path / "a.npz", 20, 0)
    prepare([tmp_path / "a.npz"], tmp_path / "small")
    with pytest.raises(ValueError, match=r"pictures of \(4, 4\) pixels do not fit digits's \(8, 8\)"):
        generated(data, source="edm", name="small", root=str(tmp_path))


@pytest.mark.long  # many calls of the script, each in a process of its own
def test_the_command(tmp_path: Path) -> None:
    part(tmp_path / "a.npz", 30, 0)
    script = [sys.executable, "scripts/prepare.py"]
    folder = f"generated={tmp_path / 'shards'}"

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [*script, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[3]
        )
        return done.returncode, done.stdout + done.stderr

    code, out = run(folder, f"parts=[{tmp_path / 'a.npz'}]")
    assert code == 0 and re.search(r"30 pictures of 10 classes in 1 shards, ready", out), out
    code, out = run(folder, "verify=true")
    assert code == 0 and "verified" in out
    code, out = run(folder)
    assert code == 2 and "parts must be a list" in out and out.count("\n") == 1
    code, out = run(folder, "verify=true", "classes=4")
    assert code == 2 and "has labels 0..9, the data set 4 classes" in out and out.count("\n") == 1
    for wrong in ("classes=ten", "classes=0"):
        code, out = run(folder, "verify=true", wrong)
        assert code == 2 and "classes must be how many the labels are of" in out and out.count("\n") == 1
    code, out = run(f"generated={tmp_path / 'few'}", f"parts=[{tmp_path / 'a.npz'}]", "classes=4")
    assert code == 2 and "labels must lie in 0..3, got 0..9" in out and not (tmp_path / "few").exists()
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["shards"][0]["part"]["name"] == "a.npz" and len(index["shards"][0]["sha256"]) == 64
