"""What every training has, whatever its method: data, network, optimizer, schedules, and how they are run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gkl.data.batches import Batches, Dataset
from gkl.distributed import Shard, world_size
from gkl.optim.averaging import Average
from trainers.loop.compute import Precision


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every training has, whatever its method.

    model: takes images in [0, 1]. augment: gkl.data.augment.Views, of pictures in files gkl.data.crops.ResizedCrop. schedule: of the
    learning rate, asked with epoch and epochs, or every step with its number from 0 and how many there are. momentum: the optimizer's,
    by epoch; None leaves it as it is. averages: of the weights, by name.
    generated: called with `data`, gives pictures that make up generated_share of each batch; an epoch is then
    len(training images) / batch_size steps. held_out: share of the training images that are not trained on, the first ones, or
    with held_out_by_class, or where pictures lie class by class, the first of each class.
    bn_groups: batch norm sees the batch in so many parts (4 cards: 4), whole ones on each process or each shared by several.
    accumulate: each process takes its part of a batch in so many micro-batches, whole batch-norm groups in each. workers: processes that read and decode, where pictures stay in their
    files. Neither of the two changes what is computed.
    precision: of the networks alone; losses and averages are float32 (float64 in tests). fp16 scales the loss.
    graph: record updates as CUDA graphs and replay them; auto: on a GPU. What is computed stays the same to the bit.
    """

    data: Dataset
    model: nn.Module
    augment: Any
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[[int, int], float]
    averages: Mapping[str, Average]
    seed: int
    epochs: int
    batch_size: int
    drop_last: bool
    bn_groups: int
    precision: Precision
    channels_last: bool
    compile: bool
    device: torch.device
    schedule_every: Literal["epoch", "step"] = "epoch"
    momentum: Callable[[int, int], float] | None = None
    generated: Callable[..., Any] | None = None
    generated_share: float = 0.0
    held_out: float = 0.0
    held_out_by_class: bool = False
    accumulate: int = 1
    workers: int | Literal["auto"] = 0
    graph: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.graph is True and self.device.type != "cuda":
            raise ValueError(
                f"graph=true records a GPU's work, and this run is on {self.device.type}; use graph=auto"
            )

    @property
    def worker_processes(self) -> int:
        """How many; auto: up to 8 of this process's share of the cores."""
        if self.workers != "auto":
            return self.workers
        return min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_batches(batches: Batches, batch_size: int, shard: Shard) -> None:
    """Raises ValueError where an epoch has no batch, or its last one leaves a process without pictures."""
    if batches.steps_per_epoch < 1:
        raise ValueError(
            f"{len(batches.labels)} training pictures are no batch of {batch_size} with drop_last; choose a smaller batch_size"
        )
    last = batches.items(batches.steps_per_epoch - 1)
    if not shard.reaches_all(last):
        raise ValueError(
            f"the last batch of an epoch has {last} pictures, of which not every one of devices={world_size()} would have some; choose "
            "another batch_size, fewer devices or drop_last=true"
        )


def check_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for an optimizer whose momentum, if it has one, no schedule reaches."""
    if any("momentum" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"momentum=... is a schedule of SGD's, and {type(optimizer).__name__} has none by that name; set momentum=null"
        )
