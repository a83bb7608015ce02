"""A comprehensive overhaul of feature distillation (Heo et al. 2019): what counts of a map is what passes its ReLU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distillation.base import Context, Distiller, Stages, Terms, stage_pairs, teacher_taps
from gkl.models.classifier import Taps


class OFD(Distiller):
    """weight * sum over pairs of stages of the partial squared distance before the ReLU, halved from stage to stage downwards.

    The teacher's map is first raised to a margin, the mean of its channel's negative half. It is computed in training mode, as
    the method's own code and mdistiller's do. Source: Eq. 1 to 5 of the paper; mdistiller's OFD.
    """

    teacher_mode = "train"
    warmup = 0

    def __init__(
        self,
        context: Context,
        *,
        kernel_size: int = 1,
        weight: float = 0.001,
        stages: Stages = "all",
        label_weight: float = 1.0,
    ) -> None:
        """kernel_size: of the connectors, a convolution and batch norm each, from the student's channels to the teacher's.

        stages: which are compared, from the first to the last, which counts most.
        """
        super().__init__(context, label_weight=label_weight)
        self.weight = weight
        self.pairs = stage_pairs(stages, context)
        assert context.network is not None
        mine, theirs = context.student.preact_features, teacher_taps(context.teacher).preact_features
        self.connectors = nn.ModuleList(
            connector(mine[s].shape[1], theirs[t].shape[1], kernel_size) for s, t in self.pairs
        )
        norms = context.network.batch_norms()  # of the stages, from the first
        for number, (_, stage) in enumerate(self.pairs):
            self.register_buffer(f"margin{number}", margin(norms[stage - 1]).view(1, -1, 1, 1))

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        targets = teacher_taps(teacher).preact_features
        total = torch.zeros(len(labels), dtype=student.logits.dtype, device=student.logits.device)
        for number, (connect, (s, t)) in enumerate(zip(self.connectors, self.pairs, strict=True)):
            lowest = getattr(self, f"margin{number}")
            mine = connect(student.preact_features[s])
            target = F.adaptive_avg_pool2d(targets[t], mine.shape[-2:])
            total = total + partial_distance(mine, target, lowest) / 2 ** (len(self.pairs) - number - 1)
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
