"""A data set in memory: all pictures as one uint8 tensor.

    data = cifar100(root="data")
    data.train_images       # (50000, 3, 32, 32) uint8

Pictures in folders or in a zip archive of folders are decoded once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gkl.data.augment import Views
from gkl.data.batches import (
    Batch,
    check_labels,
    check_trainable,
    epoch_order,
    first_of_each_class,
    steps_in,
)
from gkl.data.stores import Store
from gkl.distributed import Shard


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
    noticed: str | None = field(default=None, kw_only=True)  # a line on what may be wrong with it

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
        if not len(self.test_labels):
            raise ValueError(f"{self.name} has no test images")
        check_labels(self.name, self.num_classes, train=self.train_labels, test=self.test_labels)

    in_memory: ClassVar[bool] = True
    shots: ClassVar[None] = None

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.train_images.shape[-1]

    def batches(self, *, augment: Any, workers: int = 0, **settings: Any) -> "MemoryBatches":
        """A training's batches, see MemoryBatches; no worker processes are needed. Raises ValueError for settings that do not fit."""
        check_trainable(self.name, self.train_labels)
        if not isinstance(augment, Views):
            raise ValueError(f"{self.name} needs augment=basic or autoaug, got {type(augment).__name__}")
        side = min(self.train_images.shape[2:])
        if augment.padding > side or (augment.padding == side and augment.border == "reflect"):
            raise ValueError(
                f"augment.padding={augment.padding} is more than the {side} pixels of a side of {self.name}, whose crops would hold no "
                "picture; choose a smaller one"
            )
        return MemoryBatches(self, augment, **settings)

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


class MemoryBatches:
    """The training pictures on the device. images: (N, 3, H, W) uint8. labels: (N,). held_out: numbers in the data's own order."""

    def __init__(
        self,
        data: ImageData,
        augment: Views,
        *,
        device: torch.device,
        shard: Shard,
        batch_size: int,
        drop_last: bool,
        seed: int,
        generated: Any = None,
        generated_share: float = 0.0,
        held_out: float = 0.0,
        held_out_by_class: bool = False,
        views_together: bool = False,
    ) -> None:
        """generated: a gkl.data.generated.Generated that makes up generated_share of each batch; an epoch is then
        len(data's training images) / batch_size steps. held_out: share of the training images that are not trained on, the
        first, or the first of each class; always these where pictures lie class by class. views_together: a process has all views of
        its samples, (views, b, 3, H, W).
        """
        if (generated is not None) != (0.0 < generated_share < 1.0):
            raise ValueError(
                f"generated pictures need generated_share in (0, 1) and the other way round, got {generated_share}"
            )
        if generated is not None and not int(batch_size * generated_share):
            raise ValueError(
                f"generated_share={generated_share:g} of a batch of {batch_size} is no picture; choose at least {1 / batch_size:.3g}"
            )
        self.augment, self.device, self.shard, self.views_together = augment, device, shard, views_together
        self.batch_size, self.seed = batch_size, seed
        self.generated, self.generated_share = generated, generated_share
        labels = data.train_labels
        if not 0.0 <= held_out < 1.0:
            raise ValueError(
                f"held_out is the share of training images not trained on, in [0, 1), got {held_out}"
            )
        count = round(len(labels) * held_out)
        lie_by_class = bool((labels.diff() >= 0).all() and labels.unique().numel() > 1)
        self.noticed: str | None = None  # a line on what is done otherwise than asked
        if count and lie_by_class and not held_out_by_class:
            held_out_by_class = True
            self.noticed = (
                f"the pictures of {data.name} lie class by class, and the first {count:,} would be of few classes: held out are the "
                "first of each class, as with held_out_by_class=true"
            )
        self.held_out = first_of_each_class(labels, count) if held_out_by_class else torch.arange(count)
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[self.held_out] = False
        self.images = (data.train_images if not count else data.train_images[kept]).to(device)
        self.labels = (labels if not count else labels[kept]).to(device)
        self.steps_per_epoch = steps_in(len(labels) if generated else len(self.labels), batch_size, drop_last)

    def start_epoch(self, epoch: int) -> None:
        """Put the real pictures in the epoch's order."""
        self.order = epoch_order(len(self.labels), self.seed, epoch)

    def drawn(self, epoch: int, step: int) -> Tensor:
        """Sample numbers of a step over all processes, (B,) on the CPU; from len(labels) on they are generated ones."""
        if self.generated is None:
            return self.order[step * self.batch_size : (step + 1) * self.batch_size]
        made = int(self.batch_size * self.generated_share)
        real = self.batch_size - made
        generator = torch.Generator().manual_seed((((self.seed << 20) + epoch) << 24) + step)
        index = torch.cat(
            [
                self.order[torch.arange(step * real, (step + 1) * real) % len(self.order)],
                len(self.labels) + torch.randint(len(self.generated), (made,), generator=generator),
            ]
        )
        return index[torch.randperm(len(index), generator=generator)]

    def samples(self, step: int) -> int:
        """How many samples a step takes, over all processes."""
        left = len(self.labels) - step * self.batch_size
        return self.batch_size if self.generated else min(self.batch_size, left)

    def items(self, step: int) -> int:
        """How many items batch norm sees in a step, over all processes."""
        return self.samples(step) * (1 if self.views_together else len(self.augment.views))

    def batch(self, epoch: int, step: int) -> Batch:
        """This process's part of a step. Where the views ask for their draws' values they are made here, and no draws are left."""
        index = self.drawn(epoch, step)
        item = self.shard.mine(self.items(step))
        view, index = item // len(index), index[item % len(index)]
        images, labels = self.pictures(index)
        draws = self.augment.draws(seed=self.seed, epoch=epoch, index=index)
        there = view.to(self.device, non_blocking=True)
        if not self.augment.recordable:
            images, draws = self.see(images, there, draws), draws[:0]
        return Batch(images, draws.to(self.device, non_blocking=True), labels, there, index)

    def see(self, images: Tensor, view: Tensor, draws: Tensor) -> Tensor:
        """The views (b, 3, H, W) uint8 of pictures, or (views, b, 3, H, W) of all views together."""
        if not len(draws):
            return images
        views = self.augment.seen(images, draws)
        if len(views) == 1 and not self.views_together:
            return views[0]
        stacked = torch.stack(views)
        return stacked if self.views_together else stacked[view, torch.arange(len(view), device=view.device)]

    def pictures(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, 3, H, W) uint8 and labels (b,) of sample numbers on the CPU, on the device."""
        real = index < len(self.labels)
        if self.generated is None or bool(real.all()):
            index = index.to(self.device, non_blocking=True)
            return self.images[index], self.labels[index]
        made = self.generated.take(index[~real] - len(self.labels))
        x = torch.empty((len(index), *self.images.shape[1:]), dtype=torch.uint8, device=self.device)
        y = torch.empty(len(index), dtype=torch.int64, device=self.device)
        own, here, there, images, labels = (
            t.to(self.device, non_blocking=True)
            for t in (index[real], real.nonzero().squeeze(1), (~real).nonzero().squeeze(1), *made)
        )
        x[here], y[here] = self.images[own], self.labels[own]
        x[there], y[there] = images, labels
        return x, y


def in_memory(
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
        images.append(decoded([file for file, _ in chosen], store, image_size))
        labels.append(torch.tensor([k for _, k in chosen], dtype=torch.int64))
    return ImageData(name, len(classes), images[0], labels[0], images[1], labels[1], tuple(classes))


def decoded(files: Sequence[str], store: Store, size: int) -> Tensor:
    """Pictures as squares of `size` pixels, (N, 3, size, size) uint8. Raises PictureError naming a damaged one."""

    def one(file: str) -> np.ndarray[Any, Any]:
        rgb = store.picture(file, "pillow")
        assert isinstance(rgb, Image.Image)
        return np.asarray(
            rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BICUBIC)
        )

    images = np.empty((len(files), size, size, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        for number, pixels in enumerate(pool.map(one, files)):
            images[number] = pixels
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
