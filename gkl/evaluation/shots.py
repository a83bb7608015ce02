"""Accuracy over classes that training saw often, sometimes and rarely (Liu et al. 2019, long-tailed recognition)."""

import torch
from torch import Tensor

MANY, FEW = (
    100,
    20,
)  # more training pictures than MANY: many; fewer than FEW: few; both bounds themselves: medium


def shots(train_counts: Tensor, bounds: tuple[int, int] = (MANY, FEW)) -> dict[str, Tensor]:
    """Which classes are many, medium and few. train_counts: (C,) training pictures of each -> (C,) bool each.

    bounds: of many and few; others than the field's for data sets whose classes are smaller.
    Raises ValueError for a class without training pictures, naming it: it belongs to none of the three.
    """
    if (empty := torch.nonzero(train_counts < 1).flatten()).numel():
        raise ValueError(f"{len(empty)} classes have no training picture, the first is class {int(empty[0])}")
    many, few = train_counts > bounds[0], train_counts < bounds[1]
    return {"many": many, "medium": ~(many | few), "few": few}


def accuracy_by_shots(
    correct: Tensor, labels: Tensor, train_counts: Tensor, bounds: tuple[int, int] = (MANY, FEW)
) -> dict[str, float | None]:
    """The mean over each group's classes of their accuracy, percent, and over all classes.

    correct: (N,) bool. labels: (N,) classes. train_counts, bounds: as in `shots`. Keys many, medium, few, all; None for a group
    without a class. Raises ValueError for a class without test pictures, naming it.
    """
    classes = len(train_counts)
    tested = torch.bincount(labels, minlength=classes)
    if (empty := torch.nonzero(tested == 0).flatten()).numel():
        raise ValueError(f"{len(empty)} classes have no test picture, the first is class {int(empty[0])}")
    hits = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels.cpu(), correct.cpu().double())
    accuracy = 100.0 * hits / tested.cpu()
    groups = {name: chosen.cpu() for name, chosen in shots(train_counts, bounds).items()}
    means = {
        name: float(accuracy[chosen].mean()) if chosen.any() else None for name, chosen in groups.items()
    }
    return {**means, "all": float(accuracy.mean())}
