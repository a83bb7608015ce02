"""A data set whose pictures stay in their files: what ImageNet and its like are.

    data = imagenet_lt(root="data/imagenet", lists="data/ImageNet_LT")
    data.train.names[0], data.train.labels[0]

Nothing is decoded here but what a batch asks for. Pictures lie in a folder, a zip archive or tar shards.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from gkl.data.batches import Batch, check_labels, check_trainable, epoch_order, steps_in
from gkl.data.content import in_bytes
from gkl.data.crops import CentreCrop, Picture, ResizedCrop
from gkl.data.decoding import Decoder
from gkl.data.layout import classes_of
from gkl.data.stores import PictureError, Store, open_store
from gkl.data.workers import loader
from gkl.distributed import Shard
from gkl.lines import one_line
from gkl.rng import sample_keys


@dataclass(frozen=True)
class Split:
    """Pictures of one part of a data set. names: (N,) bytes. labels: (N,) int64."""

    store: Store
    names: "np.ndarray[Any, Any]"
    labels: Tensor

    def read(self, number: int, decoder: Decoder) -> Picture:
        """A picture by its number. Raises PictureError naming one that is missing or damaged."""
        return self.store.picture(self.names[number].decode(errors="surrogateescape"), decoder)


def split(store: Store, files: Sequence[tuple[str, int]]) -> Split:
    """A split of (name, label) pairs."""
    names = np.array(
        [in_bytes(name) for name, _ in files]
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
    noticed: str | None = None  # a line on what may be wrong with it

    in_memory: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.image_size <= self.resize and len(self.test.labels)):
            raise ValueError(
                f"{self.name} needs pictures to test with, and resize >= image_size, got {len(self.test.labels)}, "
                f"{self.resize} and {self.image_size}"
            )
        if self.shots and self.shots[1] > self.shots[0] + 1:
            raise ValueError(
                f"data.few={self.shots[1]} is past data.many={self.shots[0]}: classes would be many and few at once; many are those of more "
                "training pictures than data.many, few those of fewer than data.few"
            )
        check_labels(self.name, self.num_classes, train=self.train_labels, test=self.test_labels)

    def batches(self, *, augment: Any, **settings: Any) -> "FileBatches":
        """A training's batches, see FileBatches. Raises ValueError for settings that pictures in files cannot have."""
        check_trainable(self.name, self.train_labels)
        if not isinstance(augment, ResizedCrop):
            raise ValueError(f"{self.name} needs augment=resized_crop, got {type(augment).__name__}")
        idle = ("generated", "generated_share", "held_out", "held_out_by_class", "views_together")
        if any([settings.pop(name, None) for name in idle]):
            raise ValueError(
                f"{self.name} stays in its files: no generated pictures, none held out, one view of each; leave them out"
            )
        return FileBatches(self, augment, **settings)

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
            digest.update(b"\n".join(part.names.tolist()))
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()

    def test_batches(
        self, numbers: Tensor, batch_size: int, workers: int = 0, part: Split | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Test views (b, 3, S, S) uint8 and labels (b,) of pictures by number. part: another split than the test pictures."""
        part = part or self.test
        views = FileViews(part, CentreCrop(self.resize, self.interpolation), self.image_size, self.decoder)
        batches = [[(number, 0) for number in few] for few in numbers.split(batch_size) if len(few)]
        for x, index in loader(views, [[(int(n), k) for n, k in batch] for batch in batches], workers):
            yield x, part.labels[index]


class FileBatches:
    """Training pictures that stay in their files: worker processes make views ahead, which follow from (seed, epoch, picture) alone."""

    generated = None

    def __init__(
        self,
        data: ImageFiles,
        augment: ResizedCrop,
        *,
        device: torch.device,
        shard: Shard,
        workers: int,
        batch_size: int,
        drop_last: bool,
        seed: int,
    ) -> None:
        """workers: processes that read and decode."""
        self.data, self.augment, self.device, self.shard, self.workers = data, augment, device, shard, workers
        self.batch_size, self.seed = batch_size, seed
        self.labels, self.held_out = data.train_labels, torch.arange(0)
        self.steps_per_epoch = steps_in(len(self.labels), batch_size, drop_last)
        self.next: tuple[int, int] = (0, 0)  # epoch and step that the stream gives next
        self.stream: Iterator[Any] = iter(())

    def start_epoch(self, epoch: int) -> None:
        """Put the pictures in the epoch's order, each `repeats` times in a row."""
        order = epoch_order(len(self.labels), self.seed, epoch)
        self.order = order.repeat_interleave(self.augment.repeats)[: len(order)]

    def drawn(self, epoch: int, step: int) -> Tensor:
        """Sample numbers of a step over all processes, (B,) on the CPU."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def samples(self, step: int) -> int:
        """How many samples a step takes, over all processes."""
        return min(self.batch_size, len(self.labels) - step * self.batch_size)

    def items(self, step: int) -> int:
        """How many items batch norm sees in a step, over all processes."""
        return self.samples(step)

    def batch(self, epoch: int, step: int) -> Batch:
        """This process's part of a step; its images are views already. Raises PictureError."""
        images, index = self.ahead(epoch, step)
        x, y, view = (
            t.to(self.device, non_blocking=True)
            for t in (images, self.labels[index], torch.zeros_like(index))
        )
        return Batch(x, index.new_zeros(0, len(index), device=self.device), y, view, index)

    def ahead(self, epoch: int, step: int) -> Any:
        """The views of this process's part of a step, from those that are being made. Raises PictureError."""
        if self.next != (epoch, step):
            self.stream = loader(self.views(), _Steps(self, epoch, step), self.workers)
        self.next = (0, 0)  # unless it comes
        found = next(self.stream)
        self.next = (epoch, step + 1)
        if step + 1 == self.steps_per_epoch:
            self.stream = iter(
                ()
            )  # its processes end now; five seconds each, where they are found with the garbage
        return found

    def views(self) -> Any:
        """What makes a view by (number, key)."""
        return FileViews(self.data.train, self.augment, self.data.image_size, self.data.decoder)

    def see(self, images: Tensor, view: Tensor, draws: Tensor) -> Tensor:
        """The images, views that they are."""
        return images

    def plan(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """(number, key) of the pictures of this process's part of a step."""
        place = step * self.batch_size + self.shard.mine(self.samples(step))
        index, repeats = self.order[place], self.augment.repeats
        keys = sample_keys(self.seed, epoch, index * repeats + place % repeats, "resized_crop")
        return list(zip(index.tolist(), keys.tolist(), strict=True))


class _Steps:
    """The batches from a step to the end of its epoch, planned as they are asked for."""

    def __init__(self, batches: FileBatches, epoch: int, first: int) -> None:
        self.batches, self.epoch, self.first = batches, epoch, first

    def __len__(self) -> int:
        return self.batches.steps_per_epoch - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.batches.steps_per_epoch):
            yield self.batches.plan(self.epoch, step)


class FileViews(torch.utils.data.Dataset[tuple[Tensor, int] | PictureError]):
    """One view of a picture by (number, key)."""

    def __init__(self, part: Split, crop: Callable[..., Tensor], size: int, decoder: Decoder) -> None:
        self.part, self.crop, self.size, self.decoder = part, crop, size, decoder

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[Tensor, int] | PictureError:
        """An error is given back and not raised: a worker process would wrap it in a traceback."""
        number, key = drawn
        try:
            return self.crop(self.part.read(number, self.decoder), self.size, key=key), number
        except PictureError as error:
            return error


def long_tail(classes: int, largest: int, smallest: int) -> list[int | None]:
    """Pictures a class keeps when their number falls exponentially from the first class to the last (Cui et al. 2019)."""
    if not 1 <= smallest <= largest or classes < 2:
        raise ValueError(f"a long tail needs 1 <= smallest <= largest, got {smallest} and {largest}")
    return [round(largest * (smallest / largest) ** (k / (classes - 1))) for k in range(classes)]


def first_of_classes(
    store: Store, names: Sequence[str], files: Mapping[str, list[str]], counts: Sequence[int | None]
) -> Split:
    """The first so many files of each class. Raises ValueError naming a class that has fewer."""
    for c, count in zip(names, counts, strict=True):
        if count is not None and len(files[c]) < count:
            raise ValueError(
                f"{store.path}: class {one_line(c)} needs {count} training pictures, got {len(files[c])}; ask for fewer "
                "(data.largest, data.train_per_class)"
            )
    limits = dict(zip(names, counts, strict=True))
    return split(store, [(f, k) for k, c in enumerate(names) for f in files[c][: limits[c]]])


def other_pictures(
    path: Path, class_names: Sequence[str], classes: int | None = None
) -> tuple[Split, Tensor]:
    """Another set of pictures of some of the same classes, <class>/* under path, and which classes they are, (C,) bool.

    classes: how many there must be. Raises FileNotFoundError or ValueError naming what is missing or unknown.
    """
    store = open_store(path, "pictures", "set assessment.root=... to the folder above it")
    found = classes_of(store, (path.name,), top=f"{path.name}/")[path.name]
    if unknown := sorted(set(found) - set(class_names)):
        raise ValueError(
            f"{path} has {len(unknown)} classes that the data set has not, the first is {one_line(unknown[0])}; link or copy the folders of "
            "the shared classes alone"
        )
    if classes is not None and len(found) != classes:
        raise ValueError(
            f"{path} needs pictures of {classes} classes, got {len(found)}; bring the others, or set assessment.classes={len(found)}"
        )
    label = {c: k for k, c in enumerate(class_names)}
    files = [(name.split("/", 1)[1], label[c]) for c in sorted(found) for name in found[c]]
    mask = torch.zeros(len(class_names), dtype=torch.bool)
    mask[[label[c] for c in found]] = True
    return split(store, files), mask
