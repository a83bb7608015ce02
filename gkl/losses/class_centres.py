"""What APD compares beside logits: how close each place's feature is to the mean of each class (Tian et al. 2022).

    here, present = members(labels, num_classes)
    student, teacher = (class_centres(x, here, sharpness=10.0) for x in (features, taught))
    loss = agreement(student, teacher, present) + alignment(student, teacher, present)

Source: CriterionKmeansInterWhole of dvlab-research/APD, whose loops over the classes present are products over all classes here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NOWHERE = -1e4  # of a class without a centre: exp of it is 0


class ClassCentres(NamedTuple):
    """similarity: (b, C, h, w), of each place's feature to the means of the classes. means: (C, D), of length 1."""

    similarity: Tensor
    means: Tensor


def members(labels: Tensor, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which place is of which class, (b h w, C), 1 or 0, and which classes there are, (C,) bool. labels: (b, h, w), C and more for none."""
    here = labels.flatten()[:, None] == torch.arange(
        num_classes, device=labels.device
    )  # one_hot would read values back
    return here.to(dtype), here.any(0)


def class_centres(features: Tensor, here: Tensor, sharpness: float) -> ClassCentres:
    """Of features (b, D, h, w); similarities are cosines times the sharpness. here: as `members` gives it."""
    features = F.normalize(features, dim=1)
    sums = here.T @ features.movedim(1, -1).flatten(0, 2)  # (C, D)
    means = F.normalize(sums / here.sum(0).clamp(min=1)[:, None], dim=1)
    return ClassCentres(sharpness * torch.einsum("bdhw,cd->bchw", features, means), means)


def agreement(student: ClassCentres, teacher: ClassCentres, present: Tensor) -> Tensor:
    """KL(teacher || student) of the similarities among the classes present: the mean over pictures, these classes and places.

    Nothing goes to the teacher. present: (C,) bool.
    """
    absent = ~present[:, None, None]
    one, other = (x.similarity.masked_fill(absent, NOWHERE) for x in (student, teacher))
    each = F.kl_div(one.log_softmax(1), other.detach().softmax(1), reduction="none").masked_fill(absent, 0.0)
    return each.sum() / (present.sum().clamp(min=1) * one[:, 0].numel())


def alignment(student: ClassCentres, teacher: ClassCentres, present: Tensor) -> Tensor:
    """(1 - cosine of the centres) / 2, the mean over the classes present. Nothing goes to the teacher."""
    cosine = (student.means * teacher.means.detach()).sum(1)
    return (0.5 * (1.0 - cosine) * present).sum() / present.sum().clamp(min=1)
