"""Which pictures each step trains on: real ones in a new order every epoch, generated ones beside them, some held out.

    training = TrainingSet(data, device, batch_size=128, drop_last=False, seed=0)
    training.shuffle(epoch)
    images, labels = training.pictures(training.drawn(epoch, step))

What a step draws depends on (seed, epoch, step) alone: equal on any number of processes and after a restart.
"""

import torch
from torch import Tensor

from gkl.data import ImageData
from gkl.evaluation import first_of_each_class
from gkl.generated import Generated


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
            index = index.to(self.device)
            return self.images[index], self.labels[index]
        images, labels = self.generated.take(index[~real] - len(self.labels))
        x = torch.empty((len(index), *self.images.shape[1:]), dtype=torch.uint8, device=self.device)
        y = torch.empty(len(index), dtype=torch.int64, device=self.device)
        here, own = real.to(self.device), index[real].to(self.device)
        x[here], y[here] = self.images[own], self.labels[own]
        x[~here], y[~here] = images.to(self.device), labels.to(self.device)
        return x, y
