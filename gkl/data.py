"""Image data sets as uint8 tensors in memory.

    data = cifar100(root="data")
    data.train_images       # (50000, 3, 32, 32) uint8

Files are torchvision's, verified by its checksums; pictures in folders or in a zip archive of folders are decoded once.
"""

import hashlib
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from gkl.pictures import Store, by_class, decode, open_store


@dataclass(frozen=True)
class ImageData:
    """A data set: images (N, 3, H, W) uint8, labels (N,) int64 in 0..num_classes-1."""

    name: str
    num_classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            if (
                images.dtype != torch.uint8
                or images.ndim != 4
                or images.shape[1] != 3
                or len(images) != len(labels)
            ):
                raise ValueError(
                    f"{self.name} needs {part} images (N, 3, H, W) uint8 and N labels, got {tuple(images.shape)} "
                    f"{images.dtype} and {len(labels)}"
                )
            if not len(labels):
                raise ValueError(f"{self.name} has no {part} images")
            low, high = (int(value) for value in labels.aminmax())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{self.name} {part} labels must lie in 0..{self.num_classes - 1}, got {low}..{high}"
                )

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.train_images.shape[-1]

    def test_batches(
        self, numbers: Tensor, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Test images (b, 3, H, W) uint8 and labels (b,) by number."""
        for index in numbers.split(batch_size) if len(numbers) else ():
            yield self.test_images[index], self.test_labels[index]

    @cached_property
    def sha256(self) -> str:
        """Digest of all pixels and labels: two runs with the same digest saw the same data."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def digits() -> ImageData:
    """scikit-learn's bundled handwritten digits: 1,797 scans of 8x8 pixels, grey repeated to 3 channels.

    Every fifth scan of the bundled order, from the first, is test: 360 of them; the other 1,437 train.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    labels = torch.from_numpy(bundle.target.astype(np.int64))
    scans = torch.from_numpy(np.rint(bundle.images * 255 / 16).astype(np.uint8))
    images = scans[:, None].expand(-1, 3, -1, -1).contiguous()
    test = torch.arange(len(labels)) % 5 == 0
    return ImageData(
        "digits",
        10,
        images[~test],
        labels[~test],
        images[test],
        labels[test],
        tuple(str(d) for d in range(10)),
    )


def cifar10(root: str, mirror: str | None = None, download: bool = True) -> ImageData:
    """CIFAR-10 from torchvision's files under root, fetched when missing. See `cifar100` for the arguments."""
    return _cifar(datasets.CIFAR10, "cifar10", root, mirror, download)


def cifar100(root: str, mirror: str | None = None, download: bool = True) -> ImageData:
    """CIFAR-100 from torchvision's files under root, fetched when missing.

    mirror: where to take the archive from instead of its home page: a URL or a local file or folder. Whatever comes
    from there must have torchvision's md5. download: False only looks at what is there.
    Raises FileNotFoundError when the files are missing and cannot be had, ValueError when they are damaged.
    """
    return _cifar(datasets.CIFAR100, "cifar100", root, mirror, download)


def _cifar(kind: type[Any], name: str, root: str, mirror: str | None, download: bool) -> ImageData:
    folder, archive = Path(root) / kind.base_folder, Path(root) / kind.filename
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    if not folder.is_dir():
        if not archive.exists():
            _fetch(kind, archive, mirror, download)
        if not check_integrity(str(archive), kind.tgz_md5):
            raise ValueError(f"{archive} is damaged (md5 is not {kind.tgz_md5}); delete it and start again")
        shutil.unpack_archive(archive, root, filter="data")
    for file, md5 in files:
        if not check_integrity(str(folder / file), md5):
            state = "is damaged" if (folder / file).exists() else "is missing"
            raise ValueError(f"{folder / file} {state} (md5 must be {md5}); delete {folder} and start again")
    parts = [
        kind(root, train=train, download=False) for train in (True, False)
    ]  # checks every md5 before it unpickles
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return ImageData(
        name, len(parts[0].classes), images[0], labels[0], images[1], labels[1], tuple(parts[0].classes)
    )


def _fetch(kind: type[Any], archive: Path, mirror: str | None, download: bool) -> None:
    source = mirror or kind.url
    local = Path(source.removeprefix("file://"))
    if local.is_dir():
        local = local / kind.filename
    help_line = (
        f"put {kind.filename} or the folder {kind.base_folder} into {archive.parent} (GKL_DATA or data.root=...), or name "
        "a copy with data.mirror=URL-or-path"
    )
    if not (download or mirror):
        raise FileNotFoundError(f"no {kind.__name__} in {archive.parent}; {help_line}")
    temporary = archive.with_suffix(".part")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        if local.is_file():
            shutil.copyfile(local, temporary)
        else:
            with urllib.request.urlopen(source, timeout=30) as answer, open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file)
    except (OSError, ValueError, urllib.error.URLError) as error:
        temporary.unlink(missing_ok=True)
        raise FileNotFoundError(
            f"no {kind.__name__} in {archive.parent} and {source} cannot be read ({error}); {help_line}"
        ) from error
    if not check_integrity(str(temporary), kind.tgz_md5):
        temporary.unlink()
        raise ValueError(
            f"{source} is no byte-identical copy of {kind.filename} (md5 must be {kind.tgz_md5}); {help_line}"
        )
    temporary.rename(archive)


def image_folder(
    root: str,
    image_size: int,
    name: str | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
) -> ImageData:
    """Any pictures laid out as train/<class>/* and test/<class>/* (or val/), in a folder or a zip archive of that.

    Pictures become RGB and, where they are not image_size squares already, are resized to them (bicubic, whole
    picture). train_per_class, test_per_class: only the first so many files of each class by name.
    Raises FileNotFoundError or ValueError naming what is missing, which picture is damaged, or which classes differ.
    """
    store = open_store(Path(root))
    train, test = train_and_test(store)
    return _pictures(
        name or store.path.stem,
        sorted(train),
        train,
        test,
        store,
        image_size,
        train_per_class,
        test_per_class,
    )


def train_and_test(store: Store) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The files of train/<class>/ and test/<class>/ (or val/) by class. Raises ValueError where they are not so laid out."""
    splits = {split: by_class(store.names, split) for split in ("train", "test", "val")}
    test_split = "test" if splits["test"] else "val"
    train, test = splits["train"], splits[test_split]
    if not train or not test:
        raise ValueError(
            f"{store.path} needs pictures in train/<class>/ and in test/<class>/ or val/<class>/, got {len(store.names)} "
            "pictures elsewhere"
        )
    if set(train) != set(test):
        odd = sorted(set(train) ^ set(test))
        raise ValueError(
            f"{store.path}: train and {test_split} must have the same classes; only one of them has {', '.join(odd[:5])}"
        )
    return train, test


def _pictures(
    name: str,
    classes: Sequence[str],
    train: dict[str, list[str]],
    test: dict[str, list[str]],
    store: Store,
    image_size: int,
    train_per_class: int | None,
    test_per_class: int | None,
) -> ImageData:
    """A data set from files by class; no more than so many of each class."""
    images, labels = [], []
    for split, limit in ((train, train_per_class), (test, test_per_class)):
        chosen = [(file, k) for k, c in enumerate(classes) for file in split[c][:limit]]
        images.append(_decode([file for file, _ in chosen], store, image_size))
        labels.append(torch.tensor([k for _, k in chosen]))
    return ImageData(name, len(classes), images[0], labels[0], images[1], labels[1], tuple(classes))


def tiny_imagenet(
    root: str,
    image_size: int = 64,
    classes: int | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
) -> ImageData:
    """Tiny-ImageNet as it is distributed, unpacked or as the zip archive itself: 200 classes; its validation set is test.

    image_size, train_per_class, test_per_class and errors: as in `image_folder`; 64 leaves the pictures as they are.
    classes: only the first so many of them, in the order of their WordNet ids.
    """
    names, train, test, store = tiny_imagenet_lists(Path(root))
    return _pictures(
        "tiny_imagenet", names[:classes], train, test, store, image_size, train_per_class, test_per_class
    )


def tiny_imagenet_lists(path: Path) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]], Store]:
    """Tiny-ImageNet's classes by WordNet id, its train and validation files by class, and where they lie."""
    store = open_store(
        path, "Tiny-ImageNet", "set data.root=... to tiny-imagenet-200.zip or the folder it holds"
    )
    try:
        top = next(
            Path(f).parents[3]
            for f in store.names
            if Path(f).parts[-2:-1] == ("images",) and "train" in Path(f).parts
        )
        lists = {
            name: store.read(str(top / name)).decode().splitlines()
            for name in ("wnids.txt", "val/val_annotations.txt")
        }
    except (StopIteration, KeyError, OSError):
        raise ValueError(
            f"{path} is not laid out as Tiny-ImageNet (train/<class>/images, val/images, val/val_annotations.txt, wnids.txt)"
        ) from None
    names = sorted(line.strip() for line in lists["wnids.txt"] if line.strip())
    train: dict[str, list[str]] = {c: [] for c in names}
    test: dict[str, list[str]] = {c: [] for c in names}
    for file in store.names:
        parts = Path(file).parts
        if parts[-4:-3] == ("train",) and parts[-3] in train:
            train[parts[-3]].append(file)
    for line in lists["val/val_annotations.txt"]:
        name, label = line.split("\t")[:2]
        test[label].append(str(top / "val" / "images" / name))
    return names, train, test, store


def _decode(files: Sequence[str], store: Store, size: int) -> Tensor:
    def one(file: str) -> np.ndarray[Any, Any]:
        try:
            rgb = decode(store.read(file), "pillow")
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{store.path}: picture {file} {error}") from error
        assert isinstance(rgb, Image.Image)
        return np.asarray(
            rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BICUBIC)
        )

    images = np.empty((len(files), size, size, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        for number, pixels in enumerate(pool.map(one, files)):
            images[number] = pixels
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
