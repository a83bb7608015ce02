"""Distillation by the Jensen-Shannon divergence (Table XXIV)."""

from torch import Tensor

from gkl import losses
from gkl.distillation.base import Context, Distiller, Terms, teacher_logits
from gkl.models.classifier import Taps


class JSD(Distiller):
    """weight * JSD(student, teacher). Source: Eq. 15; the weight is not stated, see results/README.md."""

    logits_alone = True
    warmup = 0

    def __init__(self, context: Context, *, weight: float, label_weight: float = 1.0) -> None:
        super().__init__(context, label_weight=label_weight)
        self.weight = weight

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        return {
            "distillation": self.weight
            * losses.jsd(student.logits, teacher_logits(teacher), reduction="none")
        }
