"""Knowledge distillation (Hinton et al. 2015)."""

from torch import Tensor

from gkl import losses
from gkl.distillation.base import Context, Distiller, Terms, teacher_logits
from gkl.models.classifier import Taps


class KD(Distiller):
    """weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)) beside label_weight * CE."""

    logits_alone = True
    warmup = 0

    def __init__(self, context: Context, *, temperature: float, weight: float, label_weight: float) -> None:
        """temperature: T. weight: 0.9 beside label_weight 0.1 in the CIFAR-100 line of work."""
        super().__init__(context, label_weight=label_weight)
        self.temperature, self.weight = temperature, weight

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        divergence = losses.kl(
            student.logits, teacher_logits(teacher), temperature=self.temperature, reduction="none"
        )
        return {
            "distillation": self.weight * self.temperature**2 * divergence,
        }
