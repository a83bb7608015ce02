"""Random numbers, data sets and views: what a sample looks like depends on (seed, epoch, index) alone."""

import hashlib
import io
import math
import pickle
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from gkl.data.augment import Views, crop_flip, rotate15, to_float
from gkl.data.cifar import cifar10, cifar100
from gkl.data.digits import digits
from gkl.data.image_folder import image_folder
from gkl.data.memory import ImageData
from gkl.data.tiny_imagenet import tiny_imagenet
from gkl.distributed import Shard
from gkl.rng import integers, normal, sample_keys, uniform

INDEX = torch.arange(20_000)

# --- random numbers ---------------------------------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """The finaliser with Python's unbounded integers. Source: Steele, Lea, Flood 2014, Fig. 14 (mix variant 13)."""
    mask = (1 << 64) - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_numbers_are_splitmix64() -> None:
    name = int.from_bytes(hashlib.sha256(b"3/7/crop").digest()[:8], "little", signed=True)
    golden = 0x9E3779B97F4A7C15
    for index in (0, 1, 12345):
        key = splitmix64(splitmix64(index * golden + name) + name)
        bits = [splitmix64(key + step * golden) for step in (1, 2, 3)]
        keys = sample_keys(seed=3, epoch=7, index=torch.tensor([index]), stream="crop")
        assert keys.item() % (1 << 64) == key
        assert uniform(keys, 3).tolist() == [[(b >> 40) * 2.0**-24 for b in bits]]
        assert integers(keys, 3, 9).tolist() == [[((b >> 20 & 0xFFFFFFFF) * 9) >> 32 for b in bits]]


def test_numbers_depend_on_nothing_but_their_names() -> None:
    whole = sample_keys(seed=0, epoch=1, index=INDEX, stream="a")
    assert sample_keys(seed=0, epoch=1, index=INDEX[500:510], stream="a").equal(whole[500:510])
    others = [(1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (0, 11, "a")]
    assert all((sample_keys(seed=s, epoch=e, index=INDEX, stream=n) != whole).all() for s, e, n in others)
    assert len(whole.unique()) == len(whole)


def test_numbers_have_their_distributions() -> None:
    keys = sample_keys(seed=0, epoch=1, index=INDEX, stream="a")
    u = uniform(keys, 2)
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    counts = integers(keys, 1, 9).flatten().bincount(minlength=9)
    assert len(counts) == 9 and (counts - 20_000 / 9).abs().max() < 5 * math.sqrt(20_000 / 9)
    z = normal(keys, (2, 2), torch.float64)
    assert z.shape == (20_000, 2, 2) and abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.15 and z.isfinite().all()
    assert torch.corrcoef(z.flatten(1).T).fill_diagonal_(0).abs().max() < 0.03


# --- data sets --------------------------------------------------------------------------------------------------------


def test_digits_are_the_bundled_scans() -> None:
    bundle = digits()
    assert len(bundle.train_labels) == 1437 and len(bundle.test_labels) == 360 and bundle.num_classes == 10
    assert bundle.train_images.shape == (1437, 3, 8, 8) and bundle.train_images.dtype == torch.uint8
    from sklearn.datasets import load_digits

    assert (bundle.test_images[1, 0].numpy() == np.rint(load_digits().images[5] * 255 / 16)).all()
    assert bundle.test_labels[1] == load_digits().target[5]
    assert bundle.train_labels.bincount().min() > 100 and bundle.sha256 == digits().sha256


def write_cifar(folder: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A whole small CIFAR archive in torchvision's layout, its checksums put in the place of the real ones."""
    rng = np.random.default_rng(0)
    hundred = kind is datasets.CIFAR100
    key = "fine_labels" if hundred else "labels"
    names = [f"class{i}" for i in range(100 if hundred else 10)]
    pixels: dict[str, np.ndarray] = {}

    def pickled(content: dict) -> tuple[bytes, str]:
        blob = pickle.dumps(content)
        return blob, hashlib.md5(blob).hexdigest()

    files, lists = {}, {}
    for which in ("train_list", "test_list"):
        lists[which] = []
        for name, _ in getattr(kind, which):
            pixels[name] = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
            files[name], md5 = pickled({"data": pixels[name], key: [0, 1, 2, 3, 4, 9]})
            lists[which].append([name, md5])
    meta = dict(kind.meta)
    files[meta["filename"]], meta["md5"] = pickled({meta["key"]: names})
    archive = folder / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, blob in files.items():
            entry = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            entry.size = len(blob)
            tar.addfile(entry, io.BytesIO(blob))
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    for name, value in {**lists, "meta": meta, "tgz_md5": md5, "url": "file:///nowhere/at/all"}.items():
        monkeypatch.setattr(kind, name, value)
    return pixels


@pytest.mark.parametrize(("load", "kind"), [(cifar10, datasets.CIFAR10), (cifar100, datasets.CIFAR100)])
def test_cifar_from_archive_mirror_and_folder(
    load, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, root = tmp_path / "mirror", tmp_path / "root"
    mirror.mkdir()
    pixels = write_cifar(mirror, kind, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"cannot be read.*data\.root=.*data\.mirror="):
        load(str(root))
    with pytest.raises(FileNotFoundError, match=f"no {kind.__name__} in .*put {kind.filename}"):
        load(str(root), download=False)
    assert not any(root.glob("*")) if root.exists() else True
    loaded = load(str(root), mirror=str(mirror))
    first = pixels[kind.train_list[0][0]][0].reshape(3, 32, 32)
    assert (loaded.train_images[0].numpy() == first).all() and loaded.train_labels[5] == 9
    assert len(loaded.test_labels) == 6 and loaded.num_classes == (100 if kind is datasets.CIFAR100 else 10)
    again = load(str(root), download=False)  # the folder is there: neither archive nor network is touched
    assert again.sha256 == loaded.sha256
    (root / kind.filename).unlink()
    assert load(str(root), download=False).sha256 == loaded.sha256

    damaged = root / kind.base_folder / kind.test_list[0][0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{kind.test_list[0][0]} is damaged \(md5 must be .*delete"):
        load(str(root))
    damaged.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load(str(root))


def test_cifar_archives_that_are_not_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, root = tmp_path / "mirror", tmp_path / "root"
    mirror.mkdir(), root.mkdir()
    write_cifar(mirror, datasets.CIFAR10, monkeypatch)
    archive = mirror / datasets.CIFAR10.filename
    good = archive.read_bytes()
    archive.write_bytes(good + b"x")
    with pytest.raises(ValueError, match="no byte-identical copy of cifar-10-python.tar.gz"):
        cifar10(str(root), mirror=f"file://{archive}")
    assert list(root.iterdir()) == []  # nothing half-written
    (root / archive.name).write_bytes(good[:100])
    with pytest.raises(ValueError, match=r"is damaged \(md5 is not .*delete it and start again"):
        cifar10(str(root))


def write_pictures(root: Path, test: str = "test", size: int = 8) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), (test, 2)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, Path("top") / file.relative_to(folder))
    return path


def test_image_folder_and_zip_are_the_same(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", test="val")
    loaded = image_folder(str(tmp_path / "pictures"), image_size=8)
    assert loaded.class_names == ("cat", "dog") and loaded.name == "pictures"
    assert loaded.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and loaded.test_labels.tolist() == [0, 0, 1, 1]
    pixels = np.asarray(Image.open(tmp_path / "pictures/train/dog/0.png")).transpose(2, 0, 1)
    assert (loaded.train_images[3].numpy() == pixels).all()
    archive = zipped(tmp_path / "pictures", tmp_path / "pictures.zip")
    assert image_folder(str(archive), image_size=8).sha256 == loaded.sha256
    few = image_folder(str(archive), image_size=4, name="few", train_per_class=1, test_per_class=1)
    assert few.train_images.shape == (2, 3, 4, 4) and few.test_labels.tolist() == [0, 1] and few.name == "few"


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no picture folder or zip archive at .*data\.root="):
        image_folder(str(tmp_path / "absent"), image_size=8)
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(ValueError, match="neither a folder nor a zip archive; unpack it"):
        image_folder(str(tmp_path / "notes.txt"), image_size=8)
    np.savez(tmp_path / "medmnist.npz", train_images=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(
        ValueError, match="medmnist.npz holds arrays, which are not read; save them as PNG in train/<cl"
    ):
        image_folder(str(tmp_path / "medmnist.npz"), image_size=8)
    with pytest.raises(ValueError, match=r"needs pictures in train/<class>/"):
        image_folder(str(tmp_path), image_size=8)
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures/test/dog").rename(tmp_path / "pictures/test/wolf")
    with pytest.raises(
        ValueError,
        match="same classes; only train/ has dog; only test/ has wolf; sort test/ into train's classes",
    ):
        image_folder(str(tmp_path / "pictures"), image_size=8)
    (tmp_path / "pictures/test/wolf").rename(tmp_path / "pictures/test/dog")
    (tmp_path / "pictures/train/cat/1.png").write_bytes(b"\x89PNG cut short")
    with pytest.raises(ValueError, match=r"picture train/cat/1\.png is damaged"):
        image_folder(str(tmp_path / "pictures"), image_size=8)


def test_image_data_is_checked() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    good = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    for change, message in (
        ({"train_images": images.float()}, "uint8"),
        ({"test_labels": torch.tensor([0, 2])}, r"labels must lie in 0\.\.1, got 0\.\.2"),
        ({"test_images": images[:0], "test_labels": labels[:0]}, "no test images"),
        ({"train_labels": labels[:1]}, "N labels"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageData("x", 2, **{**good, **change}, class_names=("a", "b"))


# --- views ------------------------------------------------------------------------------------------------------------


def pictures(count: int = 400, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, size // 4, size // 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").round().to(torch.uint8)


def test_crop_flip_is_pad_crop_mirror() -> None:
    images = pictures(64)
    keys = sample_keys(seed=0, epoch=1, index=torch.arange(64), stream="crop_flip/0")
    out = crop_flip(images, keys, padding=4, flip=0.5)
    offsets, mirrored = integers(keys, 2, 9), uniform(keys + 1, 1).squeeze(1) < 0.5
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for i, (dy, dx) in enumerate(offsets.tolist()):
        crop = padded[i, :, dy : dy + 32, dx : dx + 32]
        assert out[i].equal(crop.flip(-1) if mirrored[i] else crop)
    assert 20 < mirrored.sum() < 44 and len({tuple(o) for o in offsets.tolist()}) > 30
    assert crop_flip(images, keys, padding=0, flip=0.0).equal(images)


def test_countable_views_have_their_numbers() -> None:
    images = torch.randint(
        0, 256, (300, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    views, index = Views(["crop_flip", "crop_flip"], padding=2), torch.arange(300) + 7
    drawn = views.numbers(seed=3, epoch=5, index=index)
    for made, numbers in zip(views(images, seed=3, epoch=5, index=index), drawn, strict=True):
        for image, view, number in zip(images, made, numbers.tolist(), strict=True):
            place, mirrored = divmod(number, 2)
            row, column = divmod(place, 5)
            crop = F.pad(image, (2, 2, 2, 2))[:, row : row + 8, column : column + 8]
            assert view.equal(crop.flip(2) if mirrored else crop)
        assert set(numbers.tolist()) == set(range(50))
    assert views.count == 50 and Views().count == 162 and not drawn[0].equal(drawn[1])
    rotated = Views(["crop_flip_rotate"])
    assert rotated.count is None
    with pytest.raises(ValueError, match=r"the views \['crop_flip_rotate'\] cannot be counted"):
        rotated.numbers(seed=0, epoch=0, index=index)


def test_a_view_depends_on_seed_epoch_and_index_alone() -> None:
    images, index = pictures(100), torch.arange(100)
    views = Views(["crop_flip", "autoaugment"])
    whole = views(images, seed=1, epoch=2, index=index)
    shuffled = torch.randperm(100)
    for part in (shuffled[:1], shuffled[:37], shuffled):
        for a, b in zip(views(images[part], seed=1, epoch=2, index=index[part]), whole, strict=True):
            assert a.equal(b[part])
    for seed, epoch in ((2, 2), (1, 3)):
        assert not views(images, seed=seed, epoch=epoch, index=index)[1].equal(whole[1])
    assert whole[0].dtype == torch.uint8 and to_float(whole[0]).max() <= 1.0
    # The strong view has crops of its own.
    assert not Views(["crop_flip", "crop_flip"])(images, seed=1, epoch=2, index=index)[1].equal(whole[0])


def test_view_errors() -> None:
    with pytest.raises(
        ValueError,
        match=r"augment.views must name some of crop_flip, crop_flip_rotate, autoaugment, autoaugment_first, got \['cutout'\]",
    ):
        Views(["cutout"])
    with pytest.raises(ValueError, match="got \\[\\]"):
        Views([])
    with pytest.raises(ValueError, match="flip in \\[0, 1\\], got 4 and 2"):
        Views(flip=2)


def test_extraction_cannot_leave_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        entry = tarfile.TarInfo("../outside")
        tar.addfile(entry, io.BytesIO(b""))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(tarfile.TarError):
        cifar10(str(tmp_path), download=False)
    assert not (tmp_path.parent / "outside").exists()


def test_reflected_border_is_numpys() -> None:
    images = torch.randint(
        0, 256, (64, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    keys = sample_keys(seed=0, epoch=1, index=torch.arange(64), stream="crop_flip/0")
    out = crop_flip(images, keys, padding=4, flip=0.0, border="reflect")
    offsets = integers(keys, 2, 9)
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (4, 4), (4, 4)], mode="reflect")
    for number, (row, column) in enumerate(offsets.tolist()):
        assert np.array_equal(out[number].numpy(), padded[number, :, row : row + 9, column : column + 7])


def test_rotation_is_torchvisions_one_angle_a_picture() -> None:
    images = torch.randint(
        0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    keys = sample_keys(seed=0, epoch=1, index=torch.arange(200), stream="rotate15/0")
    out = rotate15(images, keys)
    angles = (uniform(keys, 1).squeeze(1).double() * 30 - 15).tolist()
    assert min(angles) < -13 and max(angles) > 13
    differing = 0
    for number, angle in enumerate(angles):
        wanted = TF.rotate(images[number], -angle, InterpolationMode.NEAREST)
        differing += int((out[number] != wanted).any(0).sum())
    assert (
        differing <= 200 * 32 * 32 * 1e-3
    )  # pixels on the edge between two neighbours fall either way in float32
    straight = torch.full((4, 3, 8, 8), 9, dtype=torch.uint8)
    assert (rotate15(straight, keys[:4])[:, :, 2:6, 2:6] == 9).all()


def test_autoaugment_first_is_cropped_after_the_policy() -> None:
    """DAJAT's order: what the policy brings in at the border is cropped too, and black borders are left black."""
    images = torch.full((400, 3, 8, 8), 200, dtype=torch.uint8)
    index = torch.arange(400)
    after, before = (
        Views([view], padding=2, flip=0.0)(images, seed=0, epoch=1, index=index)[0]
        for view in ("autoaugment", "autoaugment_first")
    )
    keys = sample_keys(0, 1, index, "crop_flip/0")
    cropped = crop_flip(images, keys, padding=2, flip=0.0)
    border = cropped == 0
    assert border.any() and (before[border] == 0).all() and not (after[border] == 0).all()


@pytest.mark.parametrize("packed", [True, False])
def test_tiny_imagenet_as_it_is_distributed(packed: bool, tmp_path: Path) -> None:
    top, classes = tmp_path / "tiny-imagenet-200", ("n02", "n01")
    for c, name in enumerate(classes):
        folder = top / "train" / name / "images"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (50 * c, 10 * i, 0)).save(folder / f"{name}_{i}.png")
    (top / "val" / "images").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (64, 64), (0, 0, 20 * i)).save(top / "val" / "images" / f"val_{i}.png")
    lines = [f"val_{i}.png\t{classes[i % 2]}\t0\t0\t62\t62\n" for i in range(4)]
    (top / "val" / "val_annotations.txt").write_text("".join(lines))
    (top / "wnids.txt").write_text("n02\nn01\n")
    root = Path(shutil.make_archive(str(tmp_path / "tiny"), "zip", tmp_path, top.name)) if packed else top
    data = tiny_imagenet(str(root), image_size=32, train_per_class=2)
    assert (data.num_classes, data.class_names) == (2, ("n01", "n02"))
    assert data.train_images.shape == (4, 3, 32, 32) and data.train_labels.tolist() == [0, 0, 1, 1]
    assert data.train_images[:, 0].float().mean((1, 2)).tolist() == [50, 50, 0, 0]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.test_images[:, 2].float().mean((1, 2)).tolist() == [20, 60, 0, 40]
    assert tiny_imagenet(str(root)).train_images.shape == (6, 3, 64, 64)
    first = tiny_imagenet(str(root), image_size=32, classes=1)
    assert first.class_names == ("n01",) and first.train_images.shape[0] == 3 and not first.test_labels.any()


def test_what_is_no_tiny_imagenet_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Tiny-ImageNet at"):
        tiny_imagenet(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is not laid out as Tiny-ImageNet"):
        tiny_imagenet(str(tmp_path))
    whole = tmp_path / "whole"
    (whole / "train/n01/images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(whole / "train/n01/images/n01_0.png")
    (whole / "val").mkdir()
    (whole / "wnids.txt").write_text("n01\n")
    for wrong in ("val_0.png\tn02\t0\n", "val_0.png\n", "\n"):
        (whole / "val/val_annotations.txt").write_text(f"val_1.png\tn01\n{wrong}")
        with pytest.raises(
            ValueError, match=r"val_annotations\.txt, line 2 needs a picture and a class of wnids\.txt, got"
        ):
            tiny_imagenet(str(whole))


@pytest.mark.parametrize("padding, border", [(9, "black"), (100, "black"), (8, "reflect")])
def test_a_border_wider_than_the_pictures_is_refused(padding: int, border: Any) -> None:
    """Once most crops were all black."""
    with pytest.raises(
        ValueError, match=rf"augment\.padding={padding} is more than the 8 pixels .* of digits"
    ):
        digits().batches(augment=Views(["crop_flip"], padding=padding, border=border))


@pytest.mark.parametrize("by_class", [False, True])
def test_pictures_that_lie_class_by_class_are_held_out_by_class(by_class: bool) -> None:
    """The first of a folder's are of its first classes, which would not be trained on."""
    labels = torch.arange(60) // 15
    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    shared = {
        "device": torch.device("cpu"),
        "shard": Shard(1),
        "batch_size": 8,
        "drop_last": False,
        "seed": 0,
    }
    sorted_ones = ImageData("folder", 4, images, labels, images, labels, ("a", "b", "c", "d"))
    batches = sorted_ones.batches(
        augment=Views(("crop_flip",)), held_out=0.2, held_out_by_class=by_class, **shared
    )
    assert batches.held_out.tolist() == [0, 1, 2, 15, 16, 17, 30, 31, 32, 45, 46, 47]
    assert batches.labels.bincount().tolist() == [12] * 4
    told = "the pictures of folder lie class by class, and the first 12 would be of few classes"
    assert batches.noticed is None if by_class else batches.noticed and batches.noticed.startswith(told)
    mixed = replace(sorted_ones, train_labels=labels.flip(0).roll(7))
    batches = mixed.batches(augment=Views(("crop_flip",)), held_out=0.2, **shared)
    assert batches.held_out.tolist() == list(range(12)) and batches.noticed is None
