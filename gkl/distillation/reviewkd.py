"""Distilling knowledge via knowledge review (Chen et al. 2021): every teacher stage from all later student stages."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distillation.base import Context, Distiller, Terms, teacher_taps, warmed_up
from gkl.models.classifier import Taps


class ReviewKD(Distiller):
    """min(epoch / warmup, 1) * weight * hierarchical context loss between fused student maps and the teacher's.

    The student's maps are those after the ReLU (its STU_PREACT off, as all CIFAR-100 runs have it), the teacher's those before
    it, each with the pooled feature as a last map of 1 x 1; the stems do not take part. Source: mdistiller's ReviewKD.
    """

    def __init__(
        self,
        context: Context,
        *,
        weight: float,
        warmup: int,
        max_width: int = 512,
        student_before: bool = False,
        label_weight: float = 1.0,
    ) -> None:
        """max_width: of the fused maps. student_before: the student's maps before the ReLU, too (ImageNet). Raises ValueError for networks of different numbers of stages."""
        super().__init__(context, label_weight=label_weight)
        self.weight, self.warmup, self.student_before = weight, warmup, student_before
        student, teacher = (
            student_maps(context.student, self.student_before),
            teacher_maps(teacher_taps(context.teacher)),
        )
        if len(student) != len(teacher):
            raise ValueError(
                f"ReviewKD needs as many stages in the student as in the teacher, got {len(student) - 1} and {len(teacher) - 1}"
            )
        width = min(max_width, student[-1].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(s.shape[1], width, t.shape[1], fuse=number < len(student) - 1)
            for number, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch."""
        targets = teacher_maps(teacher_taps(teacher))
        total = torch.zeros(len(labels), dtype=student.logits.dtype, device=student.logits.device)
        residual: Tensor | None = None
        for fusion, own, target in reversed(
            list(zip(self.fusions, student_maps(student, self.student_before), targets, strict=True))
        ):
            fused, residual = fusion(own, residual, target.shape[-2:])
            total = total + hierarchical_distance(fused, target)
        return {
            "distillation": warmed_up(epoch, self.warmup) * self.weight * total,
        }


class Fusion(nn.Module):
    """Attention-based fusion of a student map with what comes from the deeper ones."""

    def __init__(self, channels: int, width: int, wanted: int, *, fuse: bool) -> None:
        """channels: of the student's map. wanted: of the teacher's. fuse: False for the deepest, which has nothing to fuse."""
        super().__init__()
        self.inward = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.outward = nn.Sequential(
            nn.Conv2d(width, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted)
        )
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuse else None
        for sequence in (self.inward, self.outward):
            nn.init.kaiming_uniform_(sequence[0].weight, a=1)  # type: ignore[arg-type]

    def forward(self, x: Tensor, residual: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The map for the teacher's (B, wanted, *size), and what the next shallower map is fused with (B, width, *size)."""
        x = self.inward(x)
        if self.attention is not None:
            assert residual is not None
            residual = F.interpolate(residual, x.shape[-2:], mode="nearest")
            shares = self.attention(torch.cat([x, residual], dim=1))
            x = x * shares[:, :1] + residual * shares[:, 1:]
        if x.shape[-1] != size[-1]:
            x = F.interpolate(x, size, mode="nearest")
        return self.outward(x), x


def student_maps(taps: Taps, before: bool) -> list[Tensor]:
    """The stages after their activation (or before), and the pooled feature (B, F, 1, 1)."""
    return [*(taps.preact_features if before else taps.features)[1:], taps.pooled[:, :, None, None]]


def teacher_maps(taps: Taps) -> list[Tensor]:
    """The stages before their activation, and the pooled feature (B, F, 1, 1)."""
    return [*taps.preact_features[1:], taps.pooled[:, :, None, None]]


def hierarchical_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Weighted mean of the mean squared errors of the maps and of their averages over 4x4, 2x2, 1x1 cells, (B,).

    Weights 1, 1/2, 1/4, 1/8 of those that are coarser than the map itself. student, teacher: (B, C, h, w).
    """
    levels = [level for level in (4, 2, 1) if level < student.shape[2]]
    weight, weights = 1.0, 1.0
    total = (student - teacher).square().flatten(1).mean(1)
    for level in levels:
        weight /= 2.0
        weights += weight
        pooled = F.adaptive_avg_pool2d(student, level) - F.adaptive_avg_pool2d(teacher, level)
        total = total + weight * pooled.square().flatten(1).mean(1)
    return total / weights
