"""CLIP's loss between pictures and captions (Radford et al. 2021), and its distillation, over the features of all processes.

    logits = similarities(images, texts, scale)                 # this process's rows, every column
    loss = contrastive(logits).sum() / size                     # its share of the mean over the `size` pairs of the global batch
    loss = loss + both_ways(SoftCrossEntropy(temperature=8.0), logits, similarities(their_images, their_texts, their_scale)).sum() / size

Each process computes its own rows alone, and gradients reach the columns that others have given: the shares add up to what one process
with all pairs computes. Source: OpenCLIP's ClipLoss and DistillClipLoss with local_loss and gather_with_grad.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.distributed import all_gather, rows_before, world_size
from gkl.losses.closed_form import gkl_loss
from gkl.losses.objectives import mean_over_batch


class Similarities(NamedTuple):
    """Logits (b, B) of a process's b pairs: image, of its pictures with all captions; text, of its captions with all pictures."""

    image: Tensor
    text: Tensor


class SimilarityLoss(Protocol):
    """What is lost between two networks' similarities of one direction."""

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Values (b,), with gradient to the student. student_logits, teacher_logits: (b, B)."""
        ...


def similarities(images: Tensor, texts: Tensor, scale: Tensor) -> Similarities:
    """scale * cosine of every pair of which one part is this process's. images, texts: (b, D), of length 1. scale: a number.

    Columns stand in the order of the processes and carry gradient, as `gkl.distributed.all_gather` has it.
    """
    width = images.shape[1]
    every_image, every_text = all_gather(torch.cat([images, texts], 1)).split(width, 1)  # (B, D) each
    return Similarities(scale * images @ every_text.T, scale * texts @ every_image.T)


def contrastive(logits: Similarities) -> Tensor:
    """Cross-entropy with the own other half, mean of the two directions, (b,)."""
    own = rows_before(logits.image) + torch.arange(len(logits.image), device=logits.image.device)
    return (
        F.cross_entropy(logits.image, own, reduction="none")
        + F.cross_entropy(logits.text, own, reduction="none")
    ) / 2


def both_ways(loss: SimilarityLoss, student: Similarities, teacher: Similarities) -> Tensor:
    """Mean of a loss over the two directions, (b,)."""
    return (loss(student.image, teacher.image) + loss(student.text, teacher.text)) / 2


@dataclass(frozen=True)
class SoftCrossEntropy:
    """- sum_j softmax(teacher / t)_j log softmax(student / t)_j: KL and the teacher's entropy, which has no gradient. No factor t^2."""

    temperature: float = 1.0

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """(b,). student_logits, teacher_logits: (b, B)."""
        t = self.temperature
        return gkl_loss(
            student_logits, teacher_logits, None, alpha=0.0, beta=1.0, gamma=0.0, temperature=t, pair_weight=1.0, reduction="none"
        )  # fmt: skip


@dataclass(frozen=True)
class SimilarityGKL:
    """GKL (Eq. 13) of logits divided by t, sample-wise: no class is the same column in the next batch. weights softmax(teacher / t)^gamma.

    The division reaches wMSE, too: similarities of 100 times a cosine would leave it the loss alone, and its weights one-hot. wMSE
    is divided by the mean of W^2 over the rows of all processes, each direction for itself.
    """

    alpha: float
    beta: float
    gamma: float
    temperature: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"loss.gamma must lie in [0, 1], got {self.gamma}")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """(b,). student_logits, teacher_logits: (b, B)."""
        return gkl_loss(
            student_logits / self.temperature,
            teacher_logits / self.temperature,
            None,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            pair_weight=None if world_size() == 1 else lambda squares: mean_over_batch(squares, 0),
            reduction="none",
        )
