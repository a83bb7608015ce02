"""Data sets read picture by picture from their files: ImageNet, ImageNet-LT, and smaller ones that stand in for them.

    data = imagenet_lt(root="data/imagenet", lists="data/ImageNet_LT")
    data.train.names[0], data.train.labels[0]

Nothing is decoded here but what a batch asks for. Pictures lie in a folder, a zip archive or tar shards.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gkl.crops import CentreCrop, Picture
from gkl.data import digits, tiny_imagenet_lists, train_and_test
from gkl.pictures import Decoder, Shards, Store, by_class, decode, open_store

IMAGENET = {"classes": 1000, "train": 1_281_167, "test": 50_000}
# The published lists of ImageNet-LT (Liu et al. 2019): lines, and classes with > 100, 20..100 and < 20 training pictures.
LISTS = {"train": 115_846, "val": 20_000, "test": 50_000}
PROFILE = (385, 479, 136)


@dataclass(frozen=True)
class Split:
    """Pictures of one part of a data set. names: (N,) bytes. labels: (N,) int64."""

    store: Store
    names: "np.ndarray[Any, Any]"
    labels: Tensor

    def read(self, number: int, decoder: Decoder) -> Picture:
        """A picture by its number. Raises ValueError naming one that is missing or damaged."""
        name = self.names[number].decode()
        try:
            return decode(self.store.read(name), decoder)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"{self.store.path}: picture {name} {error}") from error


def split(store: Store, files: Sequence[tuple[str, int]]) -> Split:
    """A split of (name, label) pairs."""
    names = np.array(
        [name.encode() for name, _ in files]
    )  # not str: worker processes share it without copying
    return Split(store, names, torch.tensor([label for _, label in files], dtype=torch.int64))


@dataclass(frozen=True)
class ImageFiles:
    """A data set whose pictures stay in their files.

    image_size: side of the views that networks see. resize: the shorter side before the middle is cut out for testing.
    interpolation: of the test views. shots: for a long-tailed data set, the bounds of many and few: more than the first, fewer than the second.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    image_size: int
    resize: int
    decoder: Decoder
    shots: tuple[int, int] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if not (self.image_size <= self.resize and len(self.train.labels) and len(self.test.labels)):
            raise ValueError(
                f"{self.name} needs pictures to train and to test with, and resize >= image_size, got {len(self.train.labels)}, "
                f"{len(self.test.labels)}, {self.resize} and {self.image_size}"
            )

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def train_labels(self) -> Tensor:
        """(N,) int64."""
        return self.train.labels

    @property
    def test_labels(self) -> Tensor:
        """(N,) int64."""
        return self.test.labels

    @cached_property
    def sha256(self) -> str:
        """Digest of the lists of files and labels: not of the pixels, which may be 150 GB."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update("\n".join(name.decode() for name in part.names.tolist()).encode())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()

    def test_batches(
        self, numbers: Tensor, batch_size: int, workers: int = 0, part: Split | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Test views (b, 3, S, S) uint8 and labels (b,) of pictures by number. part: another split than the test pictures."""
        part = part or self.test
        views = Views(part, CentreCrop(self.resize, self.interpolation), self.image_size, self.decoder)
        batches = [[(number, 0) for number in few] for few in numbers.split(batch_size) if len(few)]
        for x, index in loader(views, [[(int(n), k) for n, k in batch] for batch in batches], workers):
            yield x, part.labels[index]


class Views(Dataset[tuple[Tensor, int]]):
    """One view of a picture by (number, key)."""

    def __init__(self, part: Split, crop: Callable[..., Tensor], size: int, decoder: Decoder) -> None:
        self.part, self.crop, self.size, self.decoder = part, crop, size, decoder

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[Tensor, int]:
        number, key = drawn
        return self.crop(self.part.read(number, self.decoder), self.size, key=key), number


def loader(views: Views, batches: Iterable[Sequence[tuple[int, int]]], workers: int) -> Iterator[Any]:
    """Views (b, 3, S, S) uint8 and their numbers (b,), batch by batch in the order given, read ahead by worker processes."""
    return iter(
        DataLoader(
            views,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_single_thread if workers else None,
        )
    )


def _single_thread(worker: int) -> None:
    torch.set_num_threads(1)


def image_files(
    root: str,
    image_size: int = 224,
    resize: int = 256,
    decoder: Decoder = "torchvision",
    name: str | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
) -> ImageFiles:
    """Any pictures laid out as train/<class>/* and val/<class>/* (or test/) in a folder or zip, or WebDataset shards.

    Shards are tar files with train and val in their paths, a .cls beside each picture. decoder: torchvision is the faster,
    pillow what the published runs used; their views differ by a tenth of a grey level. train_per_class, test_per_class:
    only the first so many of each class by name. Raises FileNotFoundError or ValueError naming what is wrong.
    """
    store = open_store(Path(root))
    names, parts = _labelled(store)
    limits = (train_per_class, test_per_class)
    train, test = (split(store, _first(part, limit)) for part, limit in zip(parts, limits, strict=True))
    return ImageFiles(name or store.path.stem, names, train, test, image_size, resize, decoder)


def _labelled(store: Store) -> tuple[tuple[str, ...], list[list[tuple[str, int]]]]:
    """Class names, and the training and test files with their labels."""
    if isinstance(store, Shards):
        pairs = list(zip(store.names, store.labels.tolist(), strict=True))
        parts = [[p for p in pairs if word in p[0].lower()] for word in ("train", "val")]
        classes = int(store.labels.max()) + 1 if len(store.labels) else 0
        if not all(parts):
            raise ValueError(
                f"{store.path} needs shards with train and with val in their paths, got {len(store.shards)} others"
            )
        return tuple(map(str, range(classes))), parts
    train, test = train_and_test(store)
    names = tuple(sorted(train))
    return names, [[(f, k) for k, c in enumerate(names) for f in part[c]] for part in (train, test)]


def _first(files: Sequence[tuple[str, int]], limit: int | None) -> list[tuple[str, int]]:
    """The first so many of each class."""
    seen: dict[int, int] = {}
    kept = []
    for file, label in files:
        seen[label] = seen.get(label, 0) + 1
        if limit is None or seen[label] <= limit:
            kept.append((file, label))
    return kept


def imagenet(
    root: str,
    image_size: int = 224,
    resize: int = 256,
    decoder: Decoder = "torchvision",
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> ImageFiles:
    """ImageNet-1k (ILSVRC 2012): train/<wnid>/ and val/<wnid>/, or WebDataset shards.

    interpolation: of the test views. Other arguments as `image_files`.

    Raises ValueError when it is not whole: 1,281,167 training and 50,000 validation pictures of 1,000 classes.
    """
    _there(root)
    data = image_files(root, image_size, resize, decoder, "imagenet")
    found = {"classes": data.num_classes, "train": len(data.train_labels), "test": len(data.test_labels)}
    if found != IMAGENET:
        raise ValueError(
            f"{root} is not the whole of ImageNet: needs {_counts(IMAGENET)}, got {_counts(found)}; complete it, or use "
            "data=image_files for a part of it"
        )
    return replace(data, interpolation=interpolation)


def _counts(found: Mapping[str, int]) -> str:
    return f"{found['train']:,} training and {found['test']:,} validation pictures of {found['classes']:,} classes"


def _there(root: str) -> None:
    if not Path(root).exists():
        raise FileNotFoundError(
            f"no ImageNet at {root}; put train/<wnid>/ and val/<wnid>/ (or WebDataset shards) there, or set data.root=..."
        )


def imagenet_lt(
    root: str, lists: str, image_size: int = 224, resize: int = 256, decoder: Decoder = "torchvision"
) -> ImageFiles:
    """ImageNet-LT: the pictures of ImageNet under root that the published lists name; test is the list of that name.

    lists: folder with ImageNet_LT_train.txt, _val.txt, _test.txt, a path and a class a line. Other arguments as `image_files`.
    Raises FileNotFoundError or ValueError when lists or pictures are missing, or the lists are not the published ones by
    their lines and the number of pictures a class has.
    """
    listed = {
        part: read_list(Path(lists) / f"ImageNet_LT_{part}.txt", count) for part, count in LISTS.items()
    }
    classes = max(label for _, label in listed["train"]) + 1
    counts = torch.bincount(torch.tensor([label for _, label in listed["train"]]), minlength=classes)
    profile = (
        int((counts > 100).sum()),
        int(((counts >= 20) & (counts <= 100)).sum()),
        int((counts < 20).sum()),
    )
    if classes != 1000 or profile != PROFILE:
        raise ValueError(
            f"{lists}/ImageNet_LT_train.txt is another list: needs 1000 classes, {_profile(PROFILE)}; got {classes}, "
            f"{_profile(profile)}"
        )
    _there(root)
    store = open_store(Path(root))
    known = {os.path.splitext(os.path.basename(name))[0]: name for name in store.names}
    parts = []
    for part in ("train", "test"):
        missing = [path for path, _ in listed[part] if _stem(path) not in known]
        if missing:
            raise ValueError(
                f"{root} lacks {len(missing):,} of the {len(listed[part]):,} pictures of ImageNet-LT's {part} list, "
                f"the first is {missing[0]}; complete ImageNet there"
            )
        parts.append(split(store, [(known[_stem(path)], label) for path, label in listed[part]]))
    wnids = sorted({path.split("/")[1] for path, _ in listed["train"]})
    return ImageFiles("imagenet_lt", tuple(wnids), parts[0], parts[1], image_size, resize, decoder, (100, 20))


def _stem(path: str) -> str:
    """A picture's own name: lists, folders and shards lay the same pictures out in different ways."""
    return os.path.splitext(os.path.basename(path))[0]


def _profile(counts: Sequence[int]) -> str:
    return f"{counts[0]} many, {counts[1]} medium, {counts[2]} few"


def read_list(path: Path, lines: int) -> list[tuple[str, int]]:
    """(path, class) a line. Raises FileNotFoundError or ValueError when the file is missing, truncated or another one."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no list {path}; take ImageNet-LT's three lists (Liu et al. 2019, {', '.join(f'{n:,}' for n in LISTS.values())} "
            "lines) and set data.lists=FOLDER"
        )
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdigit():
            raise ValueError(f"{path}, line {number}: needs a path and a class, got {line[:80]!r}")
        found.append((name, int(label)))
    if len(found) != lines:
        raise ValueError(f"{path} is not the published list: needs {lines:,} lines, got {len(found):,}")
    return found


def long_tail(classes: int, largest: int, smallest: int) -> list[int | None]:
    """Pictures a class keeps when their number falls exponentially from the first class to the last (Cui et al. 2019)."""
    if not 1 <= smallest <= largest or classes < 2:
        raise ValueError(f"a long tail needs 1 <= smallest <= largest, got {smallest} and {largest}")
    return [round(largest * (smallest / largest) ** (k / (classes - 1))) for k in range(classes)]


def _kept(
    store: Store, names: Sequence[str], files: Mapping[str, list[str]], counts: Sequence[int | None]
) -> Split:
    """The first so many files of each class. Raises ValueError naming a class that has fewer."""
    for c, count in zip(names, counts, strict=True):
        if count is not None and len(files[c]) < count:
            raise ValueError(
                f"{store.path}: class {c} needs {count} training pictures, got {len(files[c])}; ask for fewer "
                "(data.largest, data.train_per_class)"
            )
    limits = dict(zip(names, counts, strict=True))
    return split(store, [(f, k) for k, c in enumerate(names) for f in files[c][: limits[c]]])


def tiny_imagenet_files(
    root: str,
    image_size: int = 64,
    resize: int | None = None,
    decoder: Decoder = "torchvision",
    classes: int | None = None,
    largest: int | None = None,
    smallest: int | None = None,
    many: int = 100,
    few: int = 20,
) -> ImageFiles:
    """Tiny-ImageNet from its files; with largest and smallest, long-tailed: so many pictures of the first and the last class.

    classes: only the first so many of them, in the order of their WordNet ids. resize: None is image_size. many, few: the
    bounds of the shots.
    """
    names, train, test, store = tiny_imagenet_lists(Path(root))
    names = names[:classes]
    kept: list[int | None] = [None] * len(names)
    shots = None
    if largest is not None:
        kept, shots = long_tail(len(names), largest, smallest or 1), (many, few)
    parts = _kept(store, names, train, kept), _kept(store, names, test, [None] * len(names))
    name = "tiny_imagenet" if shots is None else "tiny_imagenet_lt"
    return ImageFiles(name, tuple(names), *parts, image_size, resize or image_size, decoder, shots)


def digits_files(
    root: str,
    image_size: int = 32,
    resize: int | None = None,
    decoder: Decoder = "torchvision",
    train_per_class: int | None = None,
    largest: int | None = None,
    smallest: int | None = None,
) -> ImageFiles:
    """scikit-learn's digits, written once under root as train/<digit>/*.png and val/<digit>/*.png, and read from there.

    Beside them the test scans in two other manners: renditions/ (inverted, digits 0 to 4 alone) and sketch/ (edges), which
    stand in for ImageNet-R and ImageNet-Sketch. Other arguments as `tiny_imagenet_files`.
    """
    path = Path(root)
    if not path.is_dir():
        _write_digits(path)
    store = open_store(path)
    train, test = train_and_test(store)
    names = sorted(train)
    kept = [train_per_class] * len(names)
    shots = None
    if largest is not None:
        kept, shots = long_tail(len(names), largest, smallest or 1), (100, 20)
    parts = _kept(store, names, train, kept), _kept(store, names, test, [None] * len(names))
    name = "digits" if shots is None else "digits_lt"
    return ImageFiles(name, tuple(names), *parts, image_size, resize or image_size, decoder, shots)


def _write_digits(path: Path) -> None:
    """Whole or not at all: several runs may start at once."""
    data = digits()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    for part, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("val", data.test_images, data.test_labels),
        ("renditions", 255 - data.test_images, data.test_labels),
        ("sketch", edges(data.test_images), data.test_labels),
    ):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            if part == "renditions" and label > 4:
                continue
            file = temporary / part / str(label) / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    try:
        temporary.rename(path)
    except OSError:  # another run was first
        shutil.rmtree(temporary)


def edges(images: Tensor) -> Tensor:
    """Differences between neighbouring pixels, the larger of the two directions, (N, 3, H, W) uint8."""
    x = images.to(torch.int16)
    down, across = torch.zeros_like(x), torch.zeros_like(x)
    down[..., 1:, :] = (x[..., 1:, :] - x[..., :-1, :]).abs()
    across[..., 1:] = (x[..., 1:] - x[..., :-1]).abs()
    return torch.maximum(down, across).to(torch.uint8)


def other_pictures(
    path: Path, class_names: Sequence[str], classes: int | None = None
) -> tuple[Split, Tensor]:
    """Another set of pictures of some of the same classes, <class>/* under path, and which classes they are, (C,) bool.

    classes: how many there must be. Raises FileNotFoundError or ValueError naming what is missing or unknown.
    """
    store = open_store(path, "pictures", "set assessment.root=... to the folder above it")
    found = by_class([f"{path.name}/{name}" for name in store.names], path.name)
    if unknown := sorted(set(found) - set(class_names)):
        raise ValueError(
            f"{path} has {len(unknown)} classes that the data set has not, the first is {unknown[0]}"
        )
    if classes is not None and len(found) != classes:
        raise ValueError(f"{path} needs pictures of {classes} classes, got {len(found)}")
    label = {c: k for k, c in enumerate(class_names)}
    files = [(name.split("/", 1)[1], label[c]) for c in sorted(found) for name in found[c]]
    mask = torch.zeros(len(class_names), dtype=torch.bool)
    mask[[label[c] for c in found]] = True
    return split(store, files), mask
