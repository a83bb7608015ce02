"""Few labelled pictures beside many without a label: FixMatch's and Mean-Teacher's data.

    data = few_labels(cifar100("data"), labels=200, draws="usb", seed=0, steps_per_epoch=1024)
    batch = data.batches(augment=WeakStrong(), ...).batch(epoch, step)       # a FewBatch

The labelled ones are among the unlabelled, too. An epoch is a number of steps; within it both kinds come in permutations of their
own, one after the other, as USB's sampler has them.
"""

import hashlib
import random
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gkl.data.batches import check_trainable
from gkl.data.cifar import cifar100
from gkl.data.digits import digits
from gkl.data.image_folder import image_folder
from gkl.data.memory import ImageData
from gkl.data.randaugment import rand_augment
from gkl.distributed import Shard
from gkl.rng import sample_keys

Draws = Literal["usb", "dkl"]


@dataclass(frozen=True)
class FewLabels(ImageData):
    """An image data set of whose training pictures `labelled`, (L,) numbers, alone have labels that a training sees.

    unlabelled: pictures without for each one with a label in a batch.
    """

    labelled: Tensor
    steps_per_epoch: int
    unlabelled: int

    def batches(self, *, augment: Any, workers: int = 0, **settings: Any) -> Any:
        """A training's batches; seen as other pictures are (basic), all of them without labelled ones apart, as pretraining wants.

        Raises ValueError for settings that do not fit.
        """
        if not isinstance(augment, WeakStrong):
            return super().batches(augment=augment, workers=workers, **settings)
        for name in ("generated", "held_out"):
            if settings.pop(name, None):
                raise ValueError(f"{self.name} takes no {name}; leave it out")
        names = ("device", "shard", "batch_size", "seed")
        return FewBatches(self, augment, **{name: settings[name] for name in names})


class WeakStrong:
    """The two manners of seeing a picture. weak: a crop from its reflection-padded self, perhaps mirrored. strong: more after that.

    padding: pixels. flip: probability of mirroring. operations: of the strong view, see gkl.data.randaugment; 0: weak again.
    """

    views = ("labelled", "weak", "strong")

    def __init__(self, padding: int = 4, flip: float = 0.5, operations: int = 3) -> None:
        self.padding, self.flip, self.operations = padding, flip, operations

    def weak(self, image: Tensor, draw: random.Random) -> np.ndarray[Any, Any]:
        """(H, W, 3) uint8 of (3, H, W) uint8."""
        height, width = image.shape[1:]
        pixels = image.permute(1, 2, 0).numpy()
        padded = np.pad(
            pixels, ((self.padding, self.padding), (self.padding, self.padding), (0, 0)), mode="reflect"
        )
        row, column = (draw.randint(0, 2 * self.padding) for _ in range(2))
        cropped = padded[row : row + height, column : column + width]
        return cropped[:, ::-1] if draw.random() < self.flip else cropped

    def strong(self, image: Tensor, draw: random.Random) -> np.ndarray[Any, Any]:
        """(H, W, 3) uint8 of (3, H, W) uint8."""
        weak = self.weak(image, draw)
        if not self.operations:
            return weak
        return np.asarray(rand_augment(Image.fromarray(np.ascontiguousarray(weak)), draw, self.operations))


class FewBatch(NamedTuple):
    """This process's part of a step, on the device. labelled: (b, 3, H, W) uint8 with labels (b,). weak, strong: (u, 3, H, W) uint8
    views of the same unlabelled pictures, whose labels `hidden` (u,) nothing but a measure may use. keys: (b + 2u,), what each
    picture's draws within the network follow from. sample, other: numbers of the pictures, on the CPU."""

    labelled: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor
    hidden: Tensor
    keys: Tensor
    sample: Tensor
    other: Tensor


class FewBatches:
    """The batches of a semi-supervised training; views are made on the CPU, where Pillow's operations are."""

    generated = None

    def __init__(
        self,
        data: FewLabels,
        augment: WeakStrong,
        *,
        device: torch.device,
        shard: Shard,
        batch_size: int,
        seed: int,
    ) -> None:
        """batch_size: labelled pictures of a step, over all processes."""
        if batch_size > len(data.labelled):
            raise ValueError(
                f"batch_size={batch_size} is more than the {len(data.labelled)} labelled pictures; choose a smaller batch_size or more data.labels"
            )
        self.data, self.augment, self.device, self.shard = data, augment, device, shard
        self.batch_size, self.seed, self.steps_per_epoch = batch_size, seed, data.steps_per_epoch
        self.labels, self.held_out = data.train_labels.to(device), torch.arange(0)

    def start_epoch(self, epoch: int) -> None:
        """Both kinds of pictures in the epoch's order."""
        needed = self.steps_per_epoch * self.batch_size
        self.order = self.data.labelled[
            _permutations(len(self.data.labelled), needed, self.seed, epoch, "labelled")
        ]
        needed *= self.data.unlabelled
        self.other = _permutations(len(self.data.train_labels), needed, self.seed, epoch, "unlabelled")

    def samples(self, step: int) -> int:
        """How many labelled pictures a step takes, over all processes."""
        return self.batch_size

    def items(self, step: int) -> int:
        """How many pictures batch norm sees in a step, over all processes."""
        return self.batch_size * (1 + 2 * self.data.unlabelled)

    def batch(self, epoch: int, step: int) -> FewBatch:
        """This process's part of a step. A picture's views follow from its place in the epoch, where one of few comes often."""
        own = self.shard.mine(self.batch_size) + step * self.batch_size
        size = self.batch_size * self.data.unlabelled
        others = self.shard.mine(size) + step * size
        sample, other = self.order[own], self.other[others]
        made = [
            self._views(sample, own, epoch, "labelled"),
            self._views(other, others, epoch, "weak"),
            self._views(other, others, epoch, "strong"),
        ]
        keys = torch.cat([
            sample_keys(self.seed, epoch, place, f"network/{stream}")
            for place, stream in ((own, "labelled"), (others, "weak"), (others, "strong"))
        ])  # fmt: skip
        there = [tensor.to(self.device, non_blocking=True) for tensor in (*made, keys)]
        labels = [self.labels[index.to(self.device, non_blocking=True)] for index in (sample, other)]
        return FewBatch(there[0], labels[0], there[1], there[2], labels[1], there[3], sample, other)

    def _views(self, sample: Tensor, place: Tensor, epoch: int, stream: str) -> Tensor:
        make = self.augment.strong if stream == "strong" else self.augment.weak
        keys = sample_keys(self.seed, epoch, place, stream).tolist()
        pictures = self.data.train_images[sample]
        made = [make(image, random.Random(key)) for image, key in zip(pictures, keys, strict=True)]
        return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()

    def see(self, images: Tensor, view: Tensor, draws: Tensor) -> Tensor:
        """Views are made already."""
        return images


def _permutations(count: int, needed: int, seed: int, epoch: int, stream: str) -> Tensor:
    """`needed` of 0..count-1, in permutations one after the other, (needed,)."""
    start = int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{stream}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(start)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-needed // count))])[
        :needed
    ]


def labelled_pictures(labels: Tensor, per_class: int, draws: Draws, seed: int) -> Tensor:
    """Numbers of the pictures that keep their label, (classes * per_class,), class by class.

    draws: "usb", as upstream's split; "dkl", as the authors' copy of it, which has drawn from the generator twice before.
    Raises ValueError for a class with fewer pictures. labels: (N,).
    """
    generator = np.random.RandomState(seed)  # numpy's global one, as both seed it
    if draws == "dkl":
        generator.randn(2, 4)
        generator.uniform(32)
    found = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels.numpy() == label)
        if len(members) < per_class:
            raise ValueError(
                f"class {label} has {len(members)} pictures, and {per_class} are to keep their label; ask for fewer data.labels"
            )
        generator.shuffle(members)
        found.append(members[:per_class])
    return torch.from_numpy(np.concatenate(found))


def few_labels(
    data: ImageData, labels: int, draws: Draws, seed: int, steps_per_epoch: int, unlabelled: int = 1
) -> FewLabels:
    """The data set with `labels` labels, as many of each class. seed: of their choice, whatever the run's own.

    Raises ValueError when the classes cannot share them, or there is nothing to train with.
    """
    check_trainable(data.name, data.train_labels)
    if labels < 1 or labels % data.num_classes:
        raise ValueError(
            f"data.labels={labels} cannot be shared by {data.num_classes} classes; choose a multiple"
        )
    chosen = labelled_pictures(data.train_labels, labels // data.num_classes, draws, seed)
    own = {field.name: getattr(data, field.name) for field in fields(ImageData)}
    return FewLabels(
        **{**own, "name": f"{data.name}_few"},
        labelled=chosen,
        steps_per_epoch=steps_per_epoch,
        unlabelled=unlabelled,
    )


def cifar100_few(
    root: str, *, labels: int, draws: Draws, seed: int, steps_per_epoch: int, unlabelled: int = 1,
    mirror: str | None = None, download: bool = True,
) -> FewLabels:  # fmt: skip
    """CIFAR-100 with few labels; see `cifar100` and `few_labels`."""
    return few_labels(cifar100(root, mirror, download), labels, draws, seed, steps_per_epoch, unlabelled)


def digits_few(
    *, labels: int, draws: Draws, seed: int, steps_per_epoch: int, unlabelled: int = 1
) -> FewLabels:
    """scikit-learn's digits with few labels; see `few_labels`."""
    return few_labels(digits(), labels, draws, seed, steps_per_epoch, unlabelled)


def image_folder_few(
    root: str, image_size: int, *, labels: int, draws: Draws, seed: int, steps_per_epoch: int, unlabelled: int = 1,
    train_per_class: int | None = None, test_per_class: int | None = None, content: str | None = None,
) -> FewLabels:  # fmt: skip
    """Any pictures with few labels; see `gkl.data.image_folder` and `few_labels`."""
    pictures = image_folder(root, image_size, None, train_per_class, test_per_class, content)
    return few_labels(pictures, labels, draws, seed, steps_per_epoch, unlabelled)
