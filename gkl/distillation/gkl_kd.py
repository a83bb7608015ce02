"""GKL-KD, the paper's distillation (Sec. 4.2), and IKL-KD, its conference version's."""

from typing import Literal

from torch import Tensor

from gkl import losses
from gkl.distillation.base import Context, Distiller, Terms, teacher_logits, warmed_up
from gkl.distributed import rank
from gkl.losses.objectives import GKL
from gkl.losses.prior import ClassPrior
from gkl.models.classifier import Taps


class PriorWeighed(Distiller):
    """Of logits alone, wMSE weighed by the teacher's class prior where there is one: what that costs an epoch and a checkpoint."""

    logits_alone = True
    prior: ClassPrior | None

    def end_epoch(self) -> None:
        """The next epoch is weighed by what this one has seen."""
        if self.prior is not None:
            self.prior.renew()

    def merge(self) -> None:
        """The prior's sums of all processes come together in process 0."""
        if self.prior is not None:
            self.prior.merge()

    def after_load(self) -> None:
        """The loaded sums are those of all processes: only process 0 keeps them."""
        if self.prior is not None and rank() != 0:
            self.prior.sums.zero_()
            self.prior.counts.zero_()


class GKLKD(PriorWeighed):
    """min(epoch / warmup, 1) * GKL(student || teacher) beside label_weight * CE.

    The class prior is the teacher's: the mean of softmax(teacher / prior_temperature) over the last epoch's views.
    Source: the authors' GKL_KD.py and trainer, whose alpha and beta are swapped.
    """

    prior: ClassPrior

    def __init__(
        self,
        context: Context,
        *,
        alpha: float,
        beta: float,
        gamma: float,
        temperature: float,
        prior_temperature: float,
        weights: Literal["class", "sample"],
        warmup: int,
        break_asymmetry: bool = True,
        normaliser: Literal["batch", "group"] = "batch",
        label_weight: float = 1.0,
    ) -> None:
        """alpha, beta, gamma, temperature: as gkl.losses.closed_form.gkl. weights: the prior's row, or softmax(teacher / prior_temperature).

        break_asymmetry: False keeps wMSE's gradient from the student. normaliser: wMSE is divided by the mean pair weight of
        the global batch, or of a batch-norm group, one card's share.
        """
        super().__init__(context, label_weight=label_weight)
        self.objective = GKL(
            alpha, beta, gamma, temperature, weights=weights, weights_temperature=prior_temperature,
            break_asymmetry=break_asymmetry,
        )  # fmt: skip
        self.by_group = normaliser == "group"
        self.whole_batch = not self.by_group and gamma not in (0.0, 1.0)
        self.prior = ClassPrior(context.num_classes, prior_temperature)
        self.warmup = warmup

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch; the teacher's predictions are added to the prior."""
        target = teacher_logits(teacher)
        group_size = self.group_size if self.by_group else 0
        divergence = self.objective(student.logits, target, labels, self.prior, group_size)
        if self.training:
            self.prior.update(target, labels)
        return {
            "distillation": warmed_up(epoch, self.warmup) * divergence,
        }


class IKLKD(PriorWeighed):
    """As GKLKD with gamma = 1 and wMSE divided by the batch size.

    Source: the authors' v1 IKL_KD.py. On CIFAR-100 and ImageNet-LT it runs with GI off and T2 = 100, sample-wise weights that
    are nearly even; on ImageNet with GI on and T2 = 1, class-wise ones.
    """

    def __init__(
        self,
        context: Context,
        *,
        alpha: float,
        beta: float,
        temperature: float,
        weights_temperature: float,
        warmup: int,
        weights: Literal["class", "sample"] = "sample",
        label_weight: float = 1.0,
    ) -> None:
        """alpha, beta, temperature: as gkl.losses.closed_form.ikl. weights: softmax(teacher / weights_temperature) of the picture,
        or the prior's row, the mean of these over its class in the epoch before, uniform in the first.
        """
        super().__init__(context, label_weight=label_weight)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.weights_temperature, self.warmup = weights_temperature, warmup
        self.prior = ClassPrior(context.num_classes, weights_temperature) if weights == "class" else None

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch; class-wise, the teacher's predictions are added to the prior."""
        target = teacher_logits(teacher)
        divergence = losses.ikl(
            student.logits,
            target,
            None if self.prior is None else self.prior.at(labels),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            weights_temperature=self.weights_temperature,
            reduction="none",
        )
        if self.prior is not None and self.training:
            self.prior.update(target, labels)
        return {
            "distillation": warmed_up(epoch, self.warmup) * divergence,
        }
