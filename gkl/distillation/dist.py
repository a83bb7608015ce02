"""DIST (Huang et al. 2022): correlation in place of divergence, between classes and within them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.distillation.base import Context, Distiller, Terms, teacher_logits
from gkl.losses.inputs import at_least_float32
from gkl.models.classifier import Taps


class DIST(Distiller):
    """T^2 (inter * (1 - correlation over a picture's classes) + intra * (1 - correlation over a group's pictures)).

    A group is one card's share of the batch, as in the method's code. Source: Eq. 7 to 9 of the paper.
    """

    logits_alone = True
    warmup = 0

    def __init__(
        self, context: Context, *, inter: float, intra: float, temperature: float, label_weight: float = 1.0
    ) -> None:
        """inter, intra: the paper's beta and gamma. temperature: its tau."""
        super().__init__(context, label_weight=label_weight)
        self.inter, self.intra, self.temperature = inter, intra, temperature

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch; every picture of a group has the group's mean over classes."""
        own, target = (
            F.softmax(at_least_float32(z) / self.temperature, dim=1)
            for z in (student.logits, teacher_logits(teacher))
        )
        size = self.group_size or len(labels)
        within = torch.cat(
            [
                (1.0 - correlation(a.T, b.T)).mean().expand(len(a))
                for a, b in zip(own.split(size), target.split(size), strict=True)
            ]
        )
        between = 1.0 - correlation(own, target)
        return {"distillation": self.temperature**2 * (self.inter * between + self.intra * within)}


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's, of the rows of (N, M) tensors, (N,)."""
    one, other = (x - x.mean(1, keepdim=True) for x in (one, other))
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1) + 1e-8)
