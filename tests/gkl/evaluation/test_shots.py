"""Many, medium, few: the field's thresholds, and means over classes."""

import pytest
import torch

from gkl.evaluation.shots import accuracy_by_shots, shots


def test_both_bounds_are_medium() -> None:
    groups = shots(torch.tensor([101, 100, 20, 19, 1]))
    assert {name: chosen.nonzero().flatten().tolist() for name, chosen in groups.items()} == {
        "many": [0], "medium": [1, 2], "few": [3, 4],
    }  # fmt: skip


def test_means_are_over_classes_not_pictures() -> None:
    """Class 0 is tested on four pictures, the others on one or two: its weight in `many` and `all` is one class's."""
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3])
    correct = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0]).bool()
    measured = accuracy_by_shots(correct, labels, torch.tensor([500, 200, 50, 5]))
    assert measured == {"many": (25 + 100) / 2, "medium": 50.0, "few": 0.0, "all": (25 + 100 + 50 + 0) / 4}


def test_an_empty_group_has_no_number() -> None:
    measured = accuracy_by_shots(torch.tensor([True, True]), torch.tensor([0, 1]), torch.tensor([500, 50]))
    assert measured == {"many": 100.0, "medium": 100.0, "few": None, "all": 100.0}


@pytest.mark.parametrize(
    "labels, counts, message",
    [
        ([0, 1], [5, 0], "no training picture, the first is class 1"),
        ([0, 0], [5, 5], "no test picture, the first is class 1"),
    ],
)
def test_classes_without_pictures_are_named(labels: list[int], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy_by_shots(torch.tensor([True, True]), torch.tensor(labels), torch.tensor(counts))
