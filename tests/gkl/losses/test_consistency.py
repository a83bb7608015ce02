"""The terms of semi-supervised learning against their equations in float64, value and gradient to both sides."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.losses.consistency import GKL, HardLabel, MeanSquare, SoftLabel


def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def released(
    student: Tensor, teacher: Tensor, alpha: float, beta: float, gamma: float, temperature: float, held: bool
) -> Tensor:
    """dkl_loss of the authors' copy of USB, pair by pair; alpha and beta in the paper's places."""
    difference = (teacher[:, :, None] - teacher[:, None, :]) - (student[:, :, None] - student[:, None, :])
    weights = F.softmax((teacher.detach() if held else teacher) / temperature, dim=1) ** gamma
    pairs = weights[:, :, None] * weights[:, None, :]
    wmse = 0.25 * (difference**2 * pairs).sum(dim=(1, 2))
    soft = -(F.softmax(teacher, dim=-1).detach() * F.log_softmax(student, dim=-1)).sum(dim=1)
    return alpha * wmse + beta * soft


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("gamma", "temperature"), [(1.0, 1.0), (0.4, 2.0)])
def test_gkl_is_the_released_loss(gamma: float, temperature: float, held: bool) -> None:
    found = []
    for form in (GKL(0.3, 1.2, gamma, temperature, weights_gradient=not held), None):
        student, teacher = (x.requires_grad_() for x in logits())
        rows = (
            form(student, teacher) if form else released(student, teacher, 0.3, 1.2, gamma, temperature, held)
        )
        found.append((rows, *torch.autograd.grad((rows * torch.arange(1.0, 6.0)).sum(), (student, teacher))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_an_offset_costs_no_digit() -> None:
    """float32 logits, one side 1e4 higher in all classes: the loss does not know, and neither do its digits."""
    student, teacher = (x.float() for x in logits())
    form = GKL(0.3, 0.0)
    whole = form(student.double(), teacher.double())
    torch.testing.assert_close(form(student, teacher).double(), whole, rtol=1e-5, atol=0)
    coarse = (teacher * 128).round() / 128  # so that the sum is exact in float32
    torch.testing.assert_close(form(student, coarse + 8192.0), form(student, coarse), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("form", "equation"),
    [
        (
            HardLabel(),
            lambda s, t: torch.stack([-row[i] for row, i in zip(s.log_softmax(1), t.argmax(1), strict=True)]),
        ),
        (SoftLabel(), lambda s, t: -(t.softmax(1) * s.log_softmax(1)).sum(1)),
        (MeanSquare(), lambda s, t: ((s.softmax(1) - t.softmax(1)) ** 2).sum(1) / 7),
    ],
)
def test_the_others(form: Any, equation: Any) -> None:
    student, teacher = (x.requires_grad_() for x in logits())
    torch.testing.assert_close(form(student, teacher), equation(student, teacher))
    form(student, teacher).sum().backward()
    assert student.grad is not None and teacher.grad is None
