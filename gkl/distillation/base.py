"""What distillation methods share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from gkl.models.classifier import TappedClassifier, Taps

Stages = Literal["all"] | Sequence[Sequence[int]]  # [student's, teacher's], from 1; all: each with its like
Terms = dict[str, Tensor]  # name -> (b,) values whose mean over the global batch is the term


@dataclass(frozen=True)
class Context:
    """What a method is built for. student, teacher: taps of a few pictures, for their shapes alone.

    network: the teacher (None: there is none). train_labels: (N,) of the whole training set, on the CPU. seed: the run's.
    """

    student: Taps
    teacher: Taps | None
    network: TappedClassifier | None
    train_labels: Tensor
    num_classes: int
    seed: int


class Distiller(nn.Module):
    """A distillation method: layers and buffers of its own are trained and checkpointed with the student."""

    teacher_mode: Literal["eval", "train"] = (
        "eval"  # batch norm of the teacher; `train` leaves its running statistics alone
    )
    logits_alone: bool = False  # sees nothing of the teacher but its logits
    whole_batch: bool = (
        False  # a picture's value depends on others beyond its group, so the batch cannot be taken in parts
    )
    warmup: int | None = (
        None  # epochs over which the terms rise, 0: they know of no epoch, None: every epoch's are its own
    )
    group_size: int = (
        0  # pictures of a batch-norm group, one card's share in the published runs; set by the trainer
    )

    def __init__(self, context: Context, *, label_weight: float = 1.0) -> None:
        """label_weight: of the loss with the labels, which is the trainer's to compute."""
        super().__init__()
        self.label_weight = label_weight

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch but the labels' own.

        labels: (b,). epoch: 1, 2, .... index: (b,) places in the training set. The teacher's taps carry no gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def constant(self, epoch: int) -> int:
        """What the terms take from an epoch: in epochs that agree in it they are the same function."""
        return epoch if self.warmup is None else min(epoch, self.warmup)

    def end_epoch(self) -> None:
        """What the method does after the last step of an epoch."""

    def merge(self) -> None:
        """Before a checkpoint, on every process: bring what the processes hold apart together in process 0."""

    def after_load(self) -> None:
        """After a checkpoint was loaded, on every process: leave with process 0 what `merge` brought there."""


class Vanilla(Distiller):
    """No distillation: the labels alone."""

    logits_alone = True
    warmup = 0

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        return {}


def warmed_up(epoch: int, warmup: int | None) -> float:
    """The share of its weight that a distillation term has in epoch 1, 2, ...: min(epoch / warmup, 1)."""
    return min(epoch / warmup, 1.0) if warmup else 1.0


def stage_pairs(stages: Stages, context: Context) -> list[tuple[int, int]]:
    """Which stage of the student stands beside which of the teacher's: (student's, teacher's), the stems being 0.

    `all` leaves out the first stages of the network that has more. Raises ValueError for a stage that a network lacks.
    """
    counts = len(context.student.features) - 1, len(teacher_taps(context.teacher).features) - 1
    if isinstance(stages, str):
        fewer = min(counts)
        return [(counts[0] - fewer + n, counts[1] - fewer + n) for n in range(1, fewer + 1)]
    pairs = [tuple(pair) for pair in stages]
    if not pairs or any(
        len(pair) != 2 or not all(1 <= s <= n for s, n in zip(pair, counts, strict=True)) for pair in pairs
    ):
        raise ValueError(
            f"distiller.stages must be all or pairs of a student's stage in 1..{counts[0]} and a teacher's in 1..{counts[1]}, "
            f"such as [[1, 1], [2, 2]], got {[list(pair) for pair in pairs]}"
        )
    return [(own, other) for own, other in pairs]


def teacher_taps(teacher: Taps | None) -> Taps:
    """The teacher's taps. Raises ValueError when there is no teacher."""
    if teacher is None:
        raise ValueError("a distillation method needs a teacher; choose a pair=..., or the distiller vanilla")
    return teacher


def teacher_logits(teacher: Taps | None) -> Tensor:
    """The teacher's logits (b, C). Raises ValueError when there is no teacher."""
    return teacher_taps(teacher).logits
