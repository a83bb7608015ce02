"""Decoupled knowledge distillation (Zhao et al. 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.distillation.base import Context, Distiller, Terms, teacher_logits, warmed_up
from gkl.losses.inputs import at_least_float32
from gkl.models.classifier import Taps


class DKD(Distiller):
    """T^2 (alpha * KL of target against the rest + beta * KL among the rest), all at temperature T."""

    logits_alone = True

    def __init__(
        self,
        context: Context,
        *,
        alpha: float,
        beta: float,
        temperature: float,
        warmup: int,
        label_weight: float = 1.0,
    ) -> None:
        """alpha, beta: of target-class and non-target-class distillation. warmup: epochs over which both rise."""
        super().__init__(context, label_weight=label_weight)
        self.alpha, self.beta, self.temperature, self.warmup = alpha, beta, temperature, warmup

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        own, among = dkd(student.logits, teacher_logits(teacher), labels, temperature=self.temperature)
        scale = warmed_up(epoch, self.warmup) * self.temperature**2
        return {
            "distillation": scale * (self.alpha * own + self.beta * among),
        }


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The two divergences in nats, (B,) each: of (p_target, 1 - p_target), and of the softmax without the target.

    student_logits, teacher_logits: (B, C), C >= 2. labels: (B,). With two classes the second is 0. In logarithms
    throughout, so a prediction of all but 1 gives no infinity. Source: Eq. 6 and 7 of the paper.
    """
    student, teacher = (_parts(z, labels, temperature) for z in (student_logits, teacher_logits))
    kl = [
        F.kl_div(s, t, log_target=True, reduction="none").sum(-1)
        for s, t in zip(student, teacher, strict=True)
    ]
    return kl[0], kl[1]


def _parts(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log (p_target, 1 - p_target), (B, 2), and the log-softmax of the other classes, (B, C - 1)."""
    scaled = at_least_float32(logits) / temperature
    target = scaled.gather(1, labels[:, None])
    place = torch.arange(scaled.shape[1] - 1, device=scaled.device)
    others = scaled.gather(
        1, place + (place >= labels[:, None])
    )  # a mask would be read back, which waits for a GPU
    both = torch.cat([target, others.logsumexp(1, keepdim=True)], dim=1)
    return F.log_softmax(both, dim=1), F.log_softmax(others, dim=1)
