"""Relational knowledge distillation (Park et al. 2019): distances and angles between the pictures of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.distillation.base import Context, Distiller, Terms, teacher_taps
from gkl.distributed import all_gather, rank, world_size
from gkl.models.classifier import Taps


class RKD(Distiller):
    """distance_weight * Huber loss of distances + angle_weight * Huber loss of angles, on pooled features.

    Source: Eq. 4 to 8 of the paper, in mdistiller's form: the mean over all pairs and triples, those of a picture with itself
    included.
    """

    whole_batch = True
    warmup = 0

    def __init__(
        self,
        context: Context,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        label_weight: float = 1.0,
    ) -> None:
        super().__init__(context, label_weight=label_weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch: the pairs and triples that start at its pictures."""
        every, target = all_gather(student.pooled), all_gather(teacher_taps(teacher).pooled)
        own = _own_rows(len(labels), every.device)
        d, wanted = distances(every), distances(target)
        distance = F.smooth_l1_loss(d[own] / _scale(d), wanted[own] / _scale(wanted), reduction="none").mean(
            1
        )
        angle = F.smooth_l1_loss(angles(every, own), angles(target, own), reduction="none").mean((1, 2))
        return {
            "distillation": self.distance_weight * distance + self.angle_weight * angle,
        }


def distances(features: Tensor) -> Tensor:
    """Euclidean distances of all pairs, (B, B), 0 on the diagonal. features: (B, F)."""
    squared = features.square().sum(1)
    d = (squared[:, None] + squared - 2 * features @ features.T).clamp_min(1e-12).sqrt()
    return d.masked_fill(torch.eye(len(d), dtype=torch.bool, device=d.device), 0.0)


def angles(features: Tensor, vertices: Tensor) -> Tensor:
    """Cosine of the angle at i between the directions to j and to k, (b, B, B). features: (B, F). vertices: (b,) of i."""
    directions = F.normalize(features[None] - features[vertices, None], dim=2)
    return directions @ directions.mT


def _scale(d: Tensor) -> Tensor:
    """The mean of the distances above 0."""
    positive = d > 0
    return (d * positive).sum() / positive.sum()


def _own_rows(count: int, device: torch.device) -> Tensor:
    """Places of this process's pictures among those of all processes."""
    if world_size() == 1:
        return torch.arange(count, device=device)
    counts = all_gather(torch.full((1, 1), float(count), device=device)).squeeze(1).long()
    return torch.arange(count, device=device) + counts[: rank()].sum()
