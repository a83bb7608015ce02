"""Data sets that stay in their files: stores, decoding, views by key, ImageNet's and ImageNet-LT's checks, streams."""

import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from gkl.data import imagenet_lt as long_tailed
from gkl.data.crops import CentreCrop, ResizedCrop, drawing_from
from gkl.data.digits import digits_files
from gkl.data.files import FileBatches, ImageFiles, long_tail, other_pictures
from gkl.data.image_folder import image_files
from gkl.data.imagenet import imagenet
from gkl.data.imagenet_lt import imagenet_lt, read_list
from gkl.data.stores import Shards, decode, open_store
from gkl.data.tiny_imagenet import tiny_imagenet_files
from gkl.distributed import Shard

LISTS = os.environ.get("IMAGENET_LT")  # folder with the published lists
DEVICE = torch.device("cpu")


def photograph() -> bytes:
    folder = Path(load_sample_images.__globals__["__file__"]).parent / "images"
    return (folder / "china.jpg").read_bytes()


def picture(level: int, side: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    pixels = np.full((*side, 3), level, dtype=np.uint8)
    pixels[0, 0] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, 4 training and 2 validation pictures each, each of one level: 60 class + 10 number."""
    for part, count in (("train", 4), ("val", 2)):
        for label in range(3):
            for number in range(count):
                file = tmp_path / "pictures" / part / f"n0{label}" / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(picture(60 * label + 10 * number))
    return tmp_path / "pictures"


def shards(folder: Path, target: Path) -> Path:
    """The same pictures as WebDataset's tar files, two pictures a shard."""
    target.mkdir()
    for part in ("train", "val"):
        files = sorted((folder / part).rglob("*.png"))
        for first in range(0, len(files), 2):
            with tarfile.open(target / f"{part}-{first // 2:03d}.tar", "w") as tar:
                for file in files[first : first + 2]:
                    key = f"{file.parent.name}_{file.stem}"
                    for suffix, data in (
                        (".cls", str(int(file.parent.name[1:])).encode()),
                        (".png", file.read_bytes()),
                    ):
                        member = tarfile.TarInfo(key + suffix)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return target


def levels(data: ImageFiles) -> list[list[int]]:
    """Level and label of every training picture, in order."""
    return [[int(np.asarray(data.train.read(n, "pillow"))[5, 5, 0]), int(y)]
            for n, y in enumerate(data.train_labels)]  # fmt: skip


def test_folder_zip_and_shards_hold_the_same(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path))
    expected = [[60 * label + 10 * number, label] for label in range(3) for number in range(4)]
    for root in (folder, tmp_path / "pictures.zip", shards(folder, tmp_path / "tars")):
        data = image_files(str(root), image_size=8, resize=8)
        assert levels(data) == expected and data.test_labels.tolist() == [0, 0, 1, 1, 2, 2], root
        x = torch.cat([x for x, _ in data.test_batches(torch.arange(6), 4)])
        assert x.shape == (6, 3, 8, 8) and x[:, 0, 5, 5].tolist() == [0, 10, 60, 70, 120, 130]
    assert image_files(str(folder), 8, 8, train_per_class=1).train_labels.tolist() == [0, 1, 2]


def test_any_pictures_may_be_long_tailed(folder: Path, tmp_path: Path) -> None:
    for root in (folder, shards(folder, tmp_path / "tars")):
        data = image_files(str(root), 8, 8, largest=4, smallest=1, many=3, few=2)
        assert levels(data) == [[0, 0], [10, 0], [20, 0], [30, 0], [60, 1], [70, 1], [120, 2]]
        assert data.shots == (3, 2) and data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(
        ValueError, match=r"class n00 needs 8 training pictures, got 4; ask for fewer \(data\.largest\)"
    ):
        image_files(str(folder), 8, 8, largest=8, smallest=1)
    with pytest.raises(ValueError, match=r"data\.largest=4 and data\.train_per_class=2 both say"):
        image_files(str(folder), 8, 8, largest=4, train_per_class=2)


def test_a_member_of_an_archive_without_a_name_is_no_picture(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path))
        archive.writestr(zipfile.ZipInfo(""), b"left behind")
    assert len(image_files(str(tmp_path / "pictures.zip"), image_size=8, resize=8).train_labels) == 12


def test_shards_are_indexed_once_and_again_when_they_change(folder: Path, tmp_path: Path) -> None:
    root = shards(folder, tmp_path / "tars")
    first = Shards(root)
    kept = (root / "gkl-shards.npz").stat().st_mtime_ns
    assert Shards(root).names == first.names and (root / "gkl-shards.npz").stat().st_mtime_ns == kept
    (root / "train-005.tar").unlink()
    assert len(Shards(root).names) == len(first.names) - 2
    (root / "gkl-shards.npz").write_bytes(b"damaged")
    assert len(Shards(root).names) == len(first.names) - 2
    with tarfile.open(root / "train-009.tar", "w") as tar:
        member = tarfile.TarInfo("lone.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(
        ValueError, match=r"train-009.tar: picture lone.png has no lone.cls beside it.*to be unpacked"
    ):
        Shards(root)


def test_a_damaged_picture_is_named(folder: Path) -> None:
    (folder / "train" / "n01" / "2.png").write_bytes(b"not a picture")
    data = image_files(str(folder), 8, 8)
    for decoder in ("pillow", "torchvision"):
        with pytest.raises(ValueError, match=r"pictures: picture train/n01/2.png is damaged"):
            data.train.read(6, decoder)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [0, 1, 2])
def test_views_are_torchvisions_own(key: int) -> None:
    """Decoded by Pillow, a training and a test view are those of the published transforms, bit for bit."""
    data = photograph()
    published = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(0.5), T.PILToTensor()])
    with drawing_from(key):
        wanted = published(decode(data, "pillow"))
    ours = ResizedCrop()(decode(data, "pillow"), 224, key=key)
    assert ours.shape == (3, 224, 224)
    assert torch.equal(ours, wanted)
    test = T.Compose([T.Resize(256), T.CenterCrop(224), T.PILToTensor()])
    assert torch.equal(CentreCrop(256)(decode(data, "pillow"), 224), test(decode(data, "pillow")))


def test_decoders_agree() -> None:
    data = photograph()
    for crop in (ResizedCrop(), CentreCrop(256)):
        one, other = (crop(decode(data, d), 224, key=3).float() for d in ("pillow", "torchvision"))  # type: ignore[arg-type]
        assert (one - other).abs().mean() < 0.5 and (one - other).abs().max() < 40


def test_views_follow_from_the_key_and_disturb_nothing() -> None:
    picture = decode(photograph(), "torchvision")
    crop = ResizedCrop(interpolation="random", rand_augment="rand-m7-mstd0.5")
    torch.manual_seed(0)
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    views = [crop(picture, 32, key=key) for key in (5, 5, 6, -(2**62))]
    assert torch.equal(torch.rand(3), undisturbed)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


@pytest.mark.parametrize(("settings", "message"), [
    ({"scale": [0.5, 0.1]}, "scale="), ({"flip": 2.0}, "flip"), ({"repeats": 0}, "repeats must be at least 1"),
])  # fmt: skip
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResizedCrop(**settings)  # type: ignore[arg-type]


# --- ImageNet and ImageNet-LT -------------------------------------------------------------------------------------------


def test_imagenet_must_be_there_and_whole(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no ImageNet at .*; put train/<wnid>/ and val/<wnid>/"):
        imagenet(str(tmp_path / "none"))
    with pytest.raises(
        ValueError, match=r"needs 1,281,167 training and 50,000 validation .* got 12 training and 6 valid"
    ):
        imagenet(str(folder))


def write_lists(folder: Path, profile: list[int], tests: int) -> None:
    """Lists of the published form: profile[c] training pictures of class c."""
    folder.mkdir(exist_ok=True)
    for part, counts in (("train", profile), ("val", [1] * len(profile)), ("test", [tests] * len(profile))):
        place = "val" if part == "test" else "train"
        lines = [f"{place}/n{c:02d}/{part}{c}_{k}.JPEG {c}" for c, n in enumerate(counts) for k in range(n)]
        (folder / f"ImageNet_LT_{part}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def small_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lists of ImageNet-LT in small, and its pictures, the validation ones without class folders."""
    profile = [3] * 1000
    write_lists(tmp_path / "lists", profile, 1)
    monkeypatch.setattr(long_tailed, "LISTS", {"train": 3000, "val": 1000, "test": 1000})
    monkeypatch.setattr(long_tailed, "PROFILE", (0, 0, 1000))
    return tmp_path / "lists"


def test_imagenet_lt_finds_its_pictures_in_any_layout(small_lists: Path, tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    for part in ("train", "test"):
        for line in (small_lists / f"ImageNet_LT_{part}.txt").read_text().splitlines():
            name, label = line.split()
            file = root / name if part == "train" else root / "val" / Path(name).name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(int(label) % 250, (4, 4), "JPEG") if label in ("0", "7") else b"")
    data = imagenet_lt(str(root), str(small_lists), image_size=4, resize=4)
    assert (data.num_classes, len(data.train_labels), len(data.test_labels)) == (1000, 3000, 1000)
    assert data.shots == (100, 20) and data.class_names[7] == "n07"
    assert data.test.names[7] == b"val/test7_0.JPEG" and data.train.names[21] == b"train/n07/train7_0.JPEG"
    (root / "train" / "n00" / "train0_1.JPEG").unlink()
    with pytest.raises(
        ValueError, match=r"lacks 1 of the 3,000 pictures of ImageNet-LT's train list.*train0_1"
    ):
        imagenet_lt(str(root), str(small_lists))


def test_other_lists_are_named(small_lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = small_lists / "ImageNet_LT_train.txt"
    whole = train.read_text()
    train.write_text("\n".join(whole.splitlines()[:-5]))
    with pytest.raises(
        ValueError, match=r"ImageNet_LT_train.txt is not the published list: needs 3,000 lines, got 2,995"
    ):
        imagenet_lt(str(tmp_path), str(small_lists))
    train.write_text(whole.replace("JPEG 3\n", "JPEG three\n"))
    with pytest.raises(
        ValueError, match=r"line 10: needs a path and a class, got 'train/n03/train3_0.JPEG three'"
    ):
        imagenet_lt(str(tmp_path), str(small_lists))
    for label in ("-3", "²"):
        train.write_text(whole.replace("JPEG 3\n", f"JPEG {label}\n"))
        with pytest.raises(ValueError, match=r"line 10: needs a path and a class, got"):
            imagenet_lt(str(tmp_path), str(small_lists))
    train.write_text(whole)
    monkeypatch.setattr(long_tailed, "PROFILE", (385, 479, 136))
    with pytest.raises(
        ValueError, match=r"another list: needs 1000 classes, 385 many, 479 medium, 136 few; got 1000, 0 many"
    ):
        imagenet_lt(str(tmp_path), str(small_lists))
    with pytest.raises(
        FileNotFoundError, match=r"no list .*ImageNet_LT_val.txt; take ImageNet-LT's three lists"
    ):
        (small_lists / "ImageNet_LT_val.txt").unlink()
        imagenet_lt(str(tmp_path), str(small_lists))


@pytest.mark.skipif(LISTS is None, reason="needs IMAGENET_LT, a folder with the published lists")
def test_the_published_lists() -> None:
    assert LISTS is not None
    found = {part: read_list(Path(LISTS) / f"ImageNet_LT_{part}.txt", lines) for part, lines in long_tailed.LISTS.items()
             if (Path(LISTS) / f"ImageNet_LT_{part}.txt").stat().st_size}  # fmt: skip
    labels = torch.tensor([label for _, label in found["test"]])
    assert torch.bincount(labels).tolist() == [50] * 1000
    wnids = dict((path.split("/")[1], label) for path, label in found["test"])
    assert [wnids[w] for w in sorted(wnids)] == list(range(1000)), (
        "classes count by WordNet id, as torchvision's do"
    )


def test_a_long_tail_falls_exponentially() -> None:
    counts = long_tail(10, 140, 10)
    assert counts[0] == 140 and counts[-1] == 10
    ratios = [a / b for a, b in itertools.pairwise(counts)]  # type: ignore[operator]
    assert max(ratios) - min(ratios) < 0.1
    with pytest.raises(ValueError, match="1 <= smallest <= largest, got 9 and 3"):
        long_tail(10, 3, 9)


def test_tiny_imagenet_with_a_long_tail(tmp_path: Path) -> None:
    for label in range(4):
        for number in range(6):
            file = tmp_path / "tiny" / "train" / f"n0{label}" / "images" / f"n0{label}_{number}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(50 * label, (64, 64), "JPEG"))
        file = tmp_path / "tiny" / "val" / "images" / f"val_{label}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(50 * label, (64, 64), "JPEG"))
    (tmp_path / "tiny" / "wnids.txt").write_text("n03\nn00\nn01\nn02\n")
    (tmp_path / "tiny" / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{k}.JPEG\tn0{k}\t0\n" for k in range(4))
    )
    plain = tiny_imagenet_files(str(tmp_path / "tiny"))
    assert plain.name == "tiny_imagenet" and plain.shots is None and len(plain.train_labels) == 24
    tailed = tiny_imagenet_files(str(tmp_path / "tiny"), 32, largest=6, smallest=1, many=4, few=2)
    assert tailed.name == "tiny_imagenet_lt" and tailed.shots == (4, 2)
    assert torch.bincount(tailed.train_labels).tolist() == long_tail(4, 6, 1) == [6, 3, 2, 1]
    assert tailed.sha256 != plain.sha256
    with pytest.raises(ValueError, match="class n00 needs 9 training pictures, got 6; ask for fewer"):
        tiny_imagenet_files(str(tmp_path / "tiny"), largest=9, smallest=1)


# --- streams -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    return digits_files(str(tmp_path_factory.mktemp("files") / "digits"), 16, train_per_class=10)


@dataclass(frozen=True)
class Part(Shard):
    """What a process has that is alone: the `part`-th of so many."""

    part: int = 0

    def mine(self, items: int) -> Tensor:
        return torch.arange(items).tensor_split(self.groups)[self.part]


def stream(data: ImageFiles, workers: int = 0, parts: int = 1, part: int = 0, **augment: Any) -> FileBatches:
    batches = data.batches(
        augment=ResizedCrop(**augment), device=DEVICE, shard=Part(parts, part), workers=workers, batch_size=16,
        drop_last=False, seed=1,
    )  # fmt: skip
    batches.start_epoch(3)
    return batches


def views(batches: FileBatches, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views, labels and sample numbers of a step, whose batch holds views already: nothing is left to draw."""
    batch = batches.batch(epoch, step)
    assert not batch.draws.numel() and not batch.view.any()
    assert torch.equal(batches.see(batch.images, batch.view, batch.draws), batch.images)
    return batch.images, batch.labels, batch.sample


def epoch(batches: FileBatches, steps: range) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [views(batches, 3, step) for step in steps]


def same(one: list[tuple[Tensor, ...]], other: list[tuple[Tensor, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_an_epoch_is_the_same_with_workers_without_and_from_its_middle(scans: ImageFiles) -> None:
    plain = epoch(stream(scans), range(7))
    assert [len(y) for _, y, _ in plain] == [16] * 6 + [4]
    assert torch.cat([index for *_, index in plain]).sort().values.tolist() == list(range(100))
    assert same(epoch(stream(scans, workers=2), range(7)), plain)
    resumed = stream(scans, workers=2)
    assert same(epoch(resumed, range(4, 7)), plain[4:]), "resumed at step 4"
    assert not multiprocessing.active_children(), "they end with their epoch"
    for number, (x, y, index) in enumerate(plain):
        assert torch.equal(y, scans.train_labels[index]) and x.dtype == torch.uint8, number
    again = stream(scans)
    epoch(again, range(5))
    assert same([views(again, 3, 2)], [plain[2]]), "a step may be asked for once more"
    again.start_epoch(4)
    assert not torch.equal(views(again, 4, 0)[2], plain[0][2])


def test_processes_share_a_batch(scans: ImageFiles) -> None:
    plain = epoch(stream(scans), range(7))
    halves = [epoch(stream(scans, parts=2, part=k), range(7)) for k in range(2)]
    joined = [
        tuple(torch.cat(pair) for pair in zip(*both, strict=True)) for both in zip(*halves, strict=True)
    ]
    assert same(joined, plain)  # type: ignore[arg-type]


def test_repeated_augmentation_shows_a_picture_in_different_views(scans: ImageFiles) -> None:
    x, _, index = views(stream(scans, repeats=3), 3, 0)
    assert index[:3].unique().numel() == 1 and index.unique().numel() == 6
    assert not torch.equal(x[0], x[1])


def test_digits_are_written_once_and_have_their_stand_ins(scans: ImageFiles) -> None:
    root = scans.train.store.path
    before = (root / "train" / "3").stat().st_mtime_ns
    tailed = digits_files(str(root), 16, largest=136, smallest=10)
    assert (root / "train" / "3").stat().st_mtime_ns == before
    assert torch.bincount(tailed.train_labels).tolist() == long_tail(10, 136, 10) and tailed.shots == (
        100,
        20,
    )
    pictures, among = other_pictures(root / "renditions", tailed.class_names, 5)
    assert among.tolist() == [True] * 5 + [False] * 5 and pictures.labels.max() == 4
    with pytest.raises(
        ValueError,
        match="needs pictures of 200 classes, got 10; bring the others, or set assessment.classes=10",
    ):
        other_pictures(root / "sketch", tailed.class_names, 200)
    with pytest.raises(FileNotFoundError, match="no pictures at"):
        other_pictures(root / "none", tailed.class_names)
    with pytest.raises(
        ValueError,
        match="5 classes that the data set has not, the first is 0; link or copy the folders of the shared",
    ):
        other_pictures(root / "renditions", ("a", "b"))


def test_open_store_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no picture folder or zip archive at"):
        open_store(tmp_path / "none")
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="neither a folder nor a zip archive"):
        open_store(tmp_path / "file")


READING = """
import os, signal, sys, time
import torch
from gkl.data.workers import loader

class Views(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, drawn):
        time.sleep(0.02)
        return torch.zeros(3, 4, 4, dtype=torch.uint8), drawn[0]

heard = []
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(signum, lambda signum, frame: heard.append(signum))
for number, batch in enumerate(loader(Views(), [[(n, 0), (n + 1, 0)] for n in range(900)], 2)):
    if number == 3:
        print("ready", flush=True)
    if heard:
        for _ in range(10):  # what a run still does, pictures read ahead included
            time.sleep(0.05)
        break
print("saved", heard[0] if heard else None, flush=True)
"""


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        *(pytest.param(s, marks=pytest.mark.long) for s in (signal.SIGINT, signal.SIGHUP)),
    ],  # the same way
)
def test_a_signal_to_all_processes_is_the_run_s_to_heed(signum: signal.Signals) -> None:
    """As `timeout`, a scheduler and a terminal send it; the run ends by itself and leaves no worker."""
    process = subprocess.Popen(
        [sys.executable, "-c", READING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"saved {signum.value}\n", "")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_bounds_by_which_a_class_is_many_and_few_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for number in range(8):
            path = tmp_path / part / f"c{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    tail = {"largest": 4, "smallest": 2}
    assert image_files(str(tmp_path), 8, 8, **tail, many=3, few=4).shots == (3, 4)
    with pytest.raises(
        ValueError, match="data.few=20 is past data.many=8: classes would be many and few at once"
    ):
        image_files(str(tmp_path), 8, 8, **tail, many=8, few=20)
