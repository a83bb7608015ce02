"""Which pictures each step trains on: real ones in a new order every epoch, generated ones beside them, some held out.

    training = TrainingSet(data, device, batch_size=128, drop_last=False, seed=0)
    training.shuffle(epoch)
    images, labels = training.pictures(training.drawn(epoch, step))

What a step draws depends on (seed, epoch, step) alone: equal on any number of processes and after a restart.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gkl.counter import sample_keys
from gkl.crops import ResizedCrop
from gkl.data import ImageData
from gkl.evaluation import first_of_each_class
from gkl.generated import Generated
from gkl.imagenet import ImageFiles, Views, loader


class TrainingSet:
    """The training pictures on the device. images: (N, 3, H, W) uint8. labels: (N,). held_out: numbers in the data's own order."""

    def __init__(
        self,
        data: ImageData,
        device: torch.device,
        *,
        batch_size: int,
        drop_last: bool,
        seed: int,
        generated: Generated | None = None,
        generated_share: float | None = None,
        held_out: float | None = None,
        held_out_by_class: bool = False,
    ) -> None:
        """generated_share: of each batch; an epoch is then len(data's training images) / batch_size steps.

        held_out: share of the training images that are not trained on, the first, or the first of each class.
        """
        self.generated, self.generated_share = generated, generated_share or 0.0
        if (generated is not None) != (0.0 < self.generated_share < 1.0):
            raise ValueError(
                f"generated pictures need generated_share in (0, 1) and the other way round, got {generated_share}"
            )
        self.device, self.batch_size, self.seed = device, batch_size, seed
        labels = data.train_labels
        count = round(len(labels) * (held_out or 0.0))
        self.held_out = first_of_each_class(labels, count) if held_out_by_class else torch.arange(count)
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[self.held_out] = False
        self.images = (data.train_images if not count else data.train_images[kept]).to(device)
        self.labels = (labels if not count else labels[kept]).to(device)
        full, rest = divmod(len(labels) if generated else len(self.labels), batch_size)
        self.steps_per_epoch = full + (1 if rest and not drop_last else 0)

    def shuffle(self, epoch: int) -> None:
        """Put the real pictures in the epoch's order."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        self.order = torch.randperm(len(self.labels), generator=generator)

    def drawn(self, epoch: int, step: int) -> Tensor:
        """Sample indices of a step over all processes, (B,) on the CPU; from len(labels) on they are generated ones."""
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
        """How many a step draws."""
        left = len(self.labels) - step * self.batch_size
        return self.batch_size if self.generated else min(self.batch_size, left)

    def pictures(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, 3, H, W) uint8 and labels (b,) of sample indices on the CPU, on the device."""
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


class FileTrainingSet:
    """Training pictures that stay in their files: worker processes read, decode and cut them ahead of the steps.

    Every view follows from (seed, epoch, picture), so worker processes hold no state: a run goes on at any step by reading
    on from there.
    """

    generated = None

    def __init__(
        self,
        data: ImageFiles,
        device: torch.device,
        *,
        batch_size: int,
        drop_last: bool,
        seed: int,
        augment: ResizedCrop,
        workers: int,
        mine: Callable[[int], Tensor],
    ) -> None:
        """mine: which items of a batch of so many are this process's."""
        self.data, self.device, self.batch_size, self.seed = data, device, batch_size, seed
        self.augment, self.workers, self.mine = augment, workers, mine
        self.labels = data.train_labels
        full, rest = divmod(len(self.labels), batch_size)
        self.steps_per_epoch = full + (1 if rest and not drop_last else 0)
        self.next: tuple[int, int] = (0, 0)  # epoch and step that the stream gives next
        self.stream: Iterator[Any] = iter(())

    def shuffle(self, epoch: int) -> None:
        """Put the pictures in the epoch's order, each `repeats` times in a row."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        self.order = order.repeat_interleave(self.augment.repeats)[: len(order)]

    def drawn(self, epoch: int, step: int) -> Tensor:
        """Sample indices of a step over all processes, (B,) on the CPU."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def samples(self, step: int) -> int:
        """How many a step draws."""
        return min(self.batch_size, len(self.labels) - step * self.batch_size)

    def views(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's part of a step: views (b, 3, S, S) uint8, labels (b,); sample indices (b,) on the CPU."""
        if self.next != (epoch, step):
            crops = Views(self.data.train, self.augment, self.data.image_size, self.data.decoder)
            self.stream = loader(crops, _Steps(self, epoch, step), self.workers)
        images, index = next(self.stream)
        self.next = (epoch, step + 1)
        x, y = (t.to(self.device, non_blocking=True) for t in (images, self.labels[index]))
        return x, y, index

    def plan(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """(number, key) of the pictures of this process's part of a step."""
        place = step * self.batch_size + self.mine(self.samples(step))
        index, repeats = self.order[place], self.augment.repeats
        keys = sample_keys(self.seed, epoch, index * repeats + place % repeats, "resized_crop")
        return list(zip(index.tolist(), keys.tolist(), strict=True))


class _Steps:
    """The batches from a step to the end of its epoch, planned as they are asked for."""

    def __init__(self, training: FileTrainingSet, epoch: int, first: int) -> None:
        self.training, self.epoch, self.first = training, epoch, first

    def __len__(self) -> int:
        return self.training.steps_per_epoch - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.training.steps_per_epoch):
            yield self.training.plan(self.epoch, step)
