"""A comprehensive overhaul of feature distillation (Heo et al. 2019): what counts of a map is what passes its ReLU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distillation.base import Context, Distiller, Terms, teacher_taps
from gkl.models.classifier import Taps


class OFD(Distiller):
    """weight * sum over stages of the partial squared distance before the ReLU, halved from stage to stage downwards.

    The teacher's map is first raised to a margin, the mean of its channel's negative half. It is computed in training mode, as
    the method's own code and mdistiller's do. Source: Eq. 1 to 5 of the paper; mdistiller's OFD.
    """

    teacher_mode = "train"
    warmup = 0

    def __init__(
        self, context: Context, *, kernel_size: int = 1, weight: float = 0.001, label_weight: float = 1.0
    ) -> None:
        """kernel_size: of the connectors, a convolution and batch norm each, from the student's channels to the teacher's."""
        super().__init__(context, label_weight=label_weight)
        self.weight = weight
        teacher = teacher_taps(context.teacher)
        assert context.network is not None
        stages = min(len(context.student.preact_features), len(teacher.preact_features)) - 1
        self.connectors = nn.ModuleList(
            connector(s.shape[1], t.shape[1], kernel_size)
            for s, t in zip(
                context.student.preact_features[-stages:], teacher.preact_features[-stages:], strict=True
            )
        )
        margins = [margin(norm) for norm in context.network.batch_norms()[-stages:]]
        for number, values in enumerate(margins):
            self.register_buffer(f"margin{number}", values.view(1, -1, 1, 1))

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        stages = len(self.connectors)
        targets = teacher_taps(teacher).preact_features[-stages:]
        total = torch.zeros(len(labels), dtype=student.logits.dtype, device=student.logits.device)
        for number, (connect, mine, target) in enumerate(
            zip(self.connectors, student.preact_features[-stages:], targets, strict=True)
        ):
            lowest = getattr(self, f"margin{number}")
            mine, target = connect(mine), F.adaptive_avg_pool2d(target, mine.shape[-2:])
            total = total + partial_distance(mine, target, lowest) / 2 ** (stages - number - 1)
        return {"distillation": self.weight * total}


def partial_distance(student: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Sum over a picture of (student - max(target, margin))^2, where not both are below 0 and the student is, (B,).

    student, target: (B, C, H, W) before the ReLU. margin: (1, C, 1, 1), below 0.
    """
    raised = torch.maximum(target, margin)
    counts = (student > raised) | (target > 0)
    return ((student - raised).square() * counts).sum((1, 2, 3))


def margin(norm: nn.BatchNorm2d) -> Tensor:
    """Mean of the negative values of each channel, (C,), if the batch norm's output is normal: N(bias, weight^2).

    Where hardly any are negative (a share below 0.001), three standard deviations below 0.
    """
    std, mean = norm.weight.detach().double().abs(), norm.bias.detach().double()
    share = 0.5 * torch.erfc(mean / (std * math.sqrt(2.0)))  # of values below 0
    density = torch.exp(-0.5 * (mean / std).square()) / math.sqrt(2.0 * math.pi)
    expected = mean - std * density / share
    return torch.where(share > 0.001, expected, -3.0 * std).to(norm.weight.dtype)


def connector(channels: int, wanted: int, kernel_size: int) -> nn.Sequential:
    """Convolution and batch norm from the student's channels to the teacher's."""
    convolution = nn.Conv2d(channels, wanted, kernel_size, padding=(kernel_size - 1) // 2, bias=False)
    nn.init.normal_(convolution.weight, std=math.sqrt(2.0 / (kernel_size**2 * wanted)))
    return nn.Sequential(convolution, nn.BatchNorm2d(wanted))
