"""Attention transfer (Zagoruyko & Komodakis 2017): where a stage looks, not what it sees."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.distillation.base import Context, Distiller, Stages, Terms, stage_pairs, teacher_taps
from gkl.models.classifier import Taps


class AttentionTransfer(Distiller):
    """weight * sum over pairs of stages of the mean squared difference of normalised attention maps.

    Source: Eq. 2 of the paper with the mean over positions, as mdistiller's AT (p = 2, weight 1000).
    """

    warmup = 0

    def __init__(
        self, context: Context, *, weight: float, stages: Stages = "all", label_weight: float = 1.0
    ) -> None:
        """stages: which are compared. Raises ValueError where they are `all`, and not as many in both networks."""
        super().__init__(context, label_weight=label_weight)
        self.weight = weight
        own, other = (len(taps.features) - 1 for taps in (context.student, teacher_taps(context.teacher)))
        if stages == "all" and own != other:
            raise ValueError(
                f"attention transfer needs as many stages in the student as in the teacher, got {own} and {other}; "
                "set distiller.stages to the pairs that are to be compared"
            )
        self.pairs = stage_pairs(stages, context)

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        targets = teacher_taps(teacher).features
        distances = torch.stack([attention_distance(student.features[s], targets[t]) for s, t in self.pairs])
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
