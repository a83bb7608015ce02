"""What a training asks of data, in whatever form it lies: `batch(epoch, step)`.

    batches = data.batches(augment=augment, device=device, shard=Shard(bn_groups), batch_size=128, drop_last=False, seed=0)
    batches.start_epoch(epoch)
    for step in range(batches.steps_per_epoch):
        images, draws, labels, view, sample = batches.batch(epoch, step)

What a step draws follows from (seed, epoch, step) alone: it is the same on any number of processes and after a restart.
A kind of data brings a class with these members, and a NamedTuple of its own if a method is to get more than a `Batch`.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gkl.distributed import Shard


class Batch(NamedTuple):
    """This process's part of a step, before its views are made; the batch's views stand one after the other.

    images: (b, 3, H, W) uint8 on the device. draws: (operations, b) keys that the views draw from, on the device; no rows where the
    images are views already. labels: (b,) on the device. view: (b,) which of augment's views an item is, on the device.
    sample: (b,) numbers of the samples, on the CPU.
    """

    images: Tensor
    draws: Tensor
    labels: Tensor
    view: Tensor
    sample: Tensor


class Batches(Protocol):
    """The batches of a training."""

    augment: Any
    labels: Tensor  # (N,) of the pictures trained on
    held_out: Tensor  # numbers of the training pictures that are not
    generated: Any  # gkl.data.generated.Generated, or None
    steps_per_epoch: int

    def start_epoch(self, epoch: int) -> None:
        """Put the samples in the epoch's order."""

    def samples(self, step: int) -> int:
        """How many samples a step takes, over all processes."""

    def items(self, step: int) -> int:
        """How many items batch norm sees in a step, over all processes: samples times views."""

    def batch(self, epoch: int, step: int) -> Batch:
        """This process's part of a step."""

    def see(self, images: Tensor, view: Tensor, draws: Tensor) -> Tensor:
        """The views (b, 3, H, W) uint8 of a batch's pictures, on their device."""


class Dataset(Protocol):
    """What a training and its evaluation ask of a data set."""

    name: str
    in_memory: bool
    shots: tuple[int, int] | None  # of a long-tailed data set: bounds of many and few

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""

    @property
    def train_labels(self) -> Tensor:
        """(N,) int64."""

    @property
    def test_labels(self) -> Tensor:
        """(N,) int64."""

    @property
    def sha256(self) -> str:
        """Digest of what the data is."""

    def batches(self, *, device: Any, shard: Shard, **settings: Any) -> Batches:
        """The training's batches. Raises ValueError for settings that such data cannot have."""

    def test_batches(self, numbers: Tensor, batch_size: int, workers: int = 0) -> Any:
        """Test images (b, 3, H, W) uint8 and labels (b,) by number, batch by batch."""


def check_labels(name: str, classes: int, **parts: Tensor) -> None:
    """Raises ValueError for a label of a part of a data set that is none of its classes."""
    for part, labels in parts.items():
        low, high = (int(value) for value in labels.aminmax()) if len(labels) else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(f"{name} {part} labels must lie in 0..{classes - 1}, got {low}..{high}")


def check_trainable(name: str, labels: Tensor) -> None:
    """Raises ValueError for a data set that can be tested with alone."""
    if not len(labels):
        raise ValueError(
            f"{name} has no pictures to train with, only to test with; put them in train/<class>/ at data.root"
        )


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The samples 0..count-1 in an epoch's order, (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed << 20) + epoch))


def steps_in(samples: int, batch_size: int, drop_last: bool) -> int:
    """Steps of an epoch over so many samples."""
    full, rest = divmod(samples, batch_size)
    return full + (1 if rest and not drop_last else 0)


def first_of_each_class(labels: Tensor, count: int | None) -> Tensor:
    """The first `count` image numbers when the classes take turns, each in its own order; None: all, as they are.

    A fixed subset with the classes as even as they can be, whatever order a data set has. labels: (N,).
    """
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    turn = torch.zeros(len(labels), dtype=torch.int64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        turn[members] = torch.arange(len(members))
    order = sorted(range(len(labels)), key=lambda i: (int(turn[i]), int(labels[i])))
    return torch.tensor(sorted(order[:count]), dtype=torch.int64)
