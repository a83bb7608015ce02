"""Losses with their weights chosen, in the one form trainers call: what a configuration's `loss` group names.

An objective maps (student_logits (B, C), teacher_logits (B, C), labels (B,), prior) to (B,) values whose mean over the
global batch is the loss. A new loss is a function in `gkl.losses`, a class of a few lines here, and one YAML.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl import losses
from gkl.distributed import all_reduce, world_size
from gkl.losses.prior import ClassPrior


class Objective(Protocol):
    """What a trainer needs of a loss between two views or two networks."""

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, prior: ClassPrior
    ) -> Tensor:
        """Per-example values (B,)."""
        ...


@dataclass(frozen=True)
class KL:
    """weight * KL(teacher || student); TRADES' regulariser with weight = lambda. Source: Eq. 2."""

    weight: float
    temperature: float = 1.0

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, prior: ClassPrior
    ) -> Tensor:
        """Per-example values (B,)."""
        return self.weight * losses.kl(
            student_logits, teacher_logits, temperature=self.temperature, reduction="none"
        )


@dataclass(frozen=True)
class GKL:
    """The generalized KL with class-wise (prior) or sample-wise (teacher's own) weights. Source: Eq. 12 and 13.

    `alpha=0` leaves the soft cross-entropy alone, the attack that the authors run on CIFAR-10.
    weights_temperature: softens the sample-wise weights, softmax(teacher / it); class-wise ones have their prior's own.
    """

    alpha: float
    beta: float
    gamma: float
    temperature: float = 1.0
    weights: Literal["class", "sample"] = "class"
    break_asymmetry: bool = True
    weights_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.weights not in ("class", "sample"):
            raise ValueError(f"loss.weights must be class or sample, got {self.weights!r}")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"loss.gamma must lie in [0, 1], got {self.gamma}")

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        prior: ClassPrior,
        group_size: int = 0,
    ) -> Tensor:
        """Per-example values (B,), wMSE divided by the mean pair weight over all processes' batches.

        group_size: where not 0, by the mean over each so many examples that follow one another.
        """
        alone = world_size() == 1 and not group_size
        return losses.gkl(
            student_logits,
            teacher_logits,
            prior.at(labels) if self.weights == "class" else None,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            weights_temperature=self.weights_temperature,
            pair_weight=None if alone else partial(mean_over_batch, group_size=group_size),
            break_asymmetry=self.break_asymmetry,
            validate=False,
            reduction="none",
        )


def mean_over_batch(pair_weights: Tensor, group_size: int) -> Tensor:
    """Of (b,) pair weights the mean over all processes' batches, or with a group_size (b,), the means of its groups."""
    if group_size:
        return torch.cat([g.mean().expand(len(g)) for g in pair_weights.split(group_size)])
    added, count = all_reduce(torch.stack([pair_weights.sum(), pair_weights.new_full((), len(pair_weights))]))
    return added / count


class LabelLoss(Protocol):
    """What a trainer needs of a loss between logits and labels."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Per-example values (B,). target: classes (B,), or distributions over them (B, C)."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy in nats. smoothing: the share of each label that is spread over all classes."""

    smoothing: float = 0.0

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Per-example values (B,)."""
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=self.smoothing)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Mean over the classes of each one's own binary cross-entropy, in nats (Wightman et al. 2021; timm)."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Per-example values (B,)."""
        if target.ndim == 1:
            target = F.one_hot(target, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
