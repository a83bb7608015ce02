"""Attention transfer (Zagoruyko & Komodakis 2017): where a stage looks, not what it sees."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.distillation.base import Context, Distiller, Terms, teacher_taps
from gkl.models.classifier import Taps


class AttentionTransfer(Distiller):
    """weight * sum over stages of the mean squared difference of normalised attention maps.

    Source: Eq. 2 of the paper with the mean over positions, as mdistiller's AT (p = 2, weight 1000).
    """

    warmup = 0

    def __init__(self, context: Context, *, weight: float, label_weight: float = 1.0) -> None:
        """Raises ValueError for networks of different numbers of stages."""
        super().__init__(context, label_weight=label_weight)
        self.weight = weight
        stages = len(context.student.features), len(teacher_taps(context.teacher).features)
        if stages[0] != stages[1]:
            raise ValueError(
                f"attention transfer needs as many stages in the student as in the teacher, got {stages[0]} and {stages[1]}"
            )

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        pairs = zip(student.features[1:], teacher_taps(teacher).features[1:], strict=True)
        distances = torch.stack([attention_distance(s, t) for s, t in pairs])
        return {"distillation": self.weight * distances.sum(0)}


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over positions of the squared difference of the two attention maps, the larger one averaged to fit, (B,).

    student, teacher: (B, c, h, w), channels and sizes may differ.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    one, other = (attention(F.adaptive_avg_pool2d(x, size)) for x in (student, teacher))
    return (one - other).square().mean(1)


def attention(features: Tensor) -> Tensor:
    """Mean over channels of the squares, scaled to length 1: (B, c, h, w) -> (B, h w)."""
    return F.normalize(features.square().mean(1).flatten(1))
