"""Divergences of maps and what class centres say, against their equations class by class, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.losses.class_centres import agreement, alignment, class_centres, members
from gkl.losses.dense import GKL, KL


def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 2, 5, 4, 3, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher.requires_grad_()


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_kl_is_torch_s_mean_over_everything() -> None:
    student, teacher = logits()
    wanted = nn.KLDivLoss()(student.log_softmax(1), teacher.softmax(1))
    torch.testing.assert_close(KL()(student, teacher).mean(), wanted)


def test_gkl_is_the_equation_over_pairs_divided_by_the_classes() -> None:
    student, teacher = logits()
    s, t = (x.movedim(1, -1).flatten(0, 2) for x in (student, teacher))
    weights = t.softmax(1) ** 0.4
    pairs = weights[:, :, None] * weights[:, None]
    gaps = ((t[:, :, None] - t[:, None]) - (s[:, :, None] - s[:, None])) ** 2
    wmse = 0.25 * (gaps * pairs).sum((1, 2)) / pairs.sum((1, 2)).mean()
    wanted = (2.0 * wmse - 3.0 * (t.softmax(1) * s.log_softmax(1)).sum(1)) / 5
    found = GKL(alpha=2.0, beta=3.0, gamma=0.4)(student, teacher)
    torch.testing.assert_close(found, wanted.view(2, 4, 3))


@pytest.mark.parametrize("term", [KL(), GKL()])
def test_nothing_goes_to_the_teacher_nor_to_what_does_not_count(term: Any) -> None:
    student, teacher = logits()
    counted = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    found = term(student, teacher, counted)
    assert found.shape == (2, 4, 3) and (found[~counted] == 0).all() and (found[counted] > 0).all()
    found.sum().backward()
    assert teacher.grad is None
    gradient = student.grad
    assert gradient is not None
    assert (gradient.movedim(1, -1)[~counted] == 0).all() and (gradient.movedim(1, -1)[counted] != 0).all()


def test_class_centres_are_those_of_a_loop_over_the_classes() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 3, 3)) * 2  # 0, 2 and 4 of 7 classes
    labels[0, 0] = 255
    here, present = members(labels, 7, torch.float64)
    assert present.nonzero().flatten().tolist() == [0, 2, 4] and here.sum() == 15
    one, two = (class_centres(x, here, 10.0) for x in (features, other))
    means = []
    for x, made in ((features, one), (other, two)):
        unit = F.normalize(x, dim=1).movedim(1, -1)
        centres = torch.stack([F.normalize(unit[labels == c].mean(0), dim=0) for c in (0, 2, 4)])
        torch.testing.assert_close(made.means[[0, 2, 4]], centres)
        torch.testing.assert_close(made.similarity[:, [0, 2, 4]].movedim(1, -1), 10.0 * unit @ centres.T)
        means.append(centres)
    kl = F.kl_div(
        one.similarity[:, [0, 2, 4]].log_softmax(1), two.similarity[:, [0, 2, 4]].softmax(1), reduction="none"
    ).mean()
    torch.testing.assert_close(agreement(one, two, present), kl)
    torch.testing.assert_close(alignment(one, two, present), 0.5 * (1 - (means[0] * means[1]).sum(1)).mean())
    (agreement(one, two, present) + alignment(one, two, present)).backward()
    assert other.grad is None and features.grad is not None and features.grad.isfinite().all()


def test_where_no_place_has_a_class_nothing_is_asked() -> None:
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    here, present = members(torch.full((1, 2, 2), 255), 3, torch.float32)
    centres = class_centres(features, here, 10.0)
    found = agreement(centres, centres, present) + alignment(centres, centres, present)
    found.backward()
    assert found == 0 and features.grad is not None and (features.grad == 0).all()
