"""Generated pictures: parts that the test writes, streamed into shards and read back."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gkl.data.digits import digits
from gkl.data.generated import ROWS, class_gaussian, generated, open_shards, prepare


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
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["shards"][0]["part"]["name"] == "a.npz" and len(index["shards"][0]["sha256"]) == 64
