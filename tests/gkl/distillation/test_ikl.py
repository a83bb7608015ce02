"""IKL-KD, class-wise as on ImageNet, against a restatement in loops."""

from typing import Any

import torch
from torch import Tensor

from gkl.distillation import Context
from gkl.distillation.gkl_kd import IKLKD
from gkl.models.classifier import Taps

B, C = 7, 8  # 1 / 8 is the same in float32


def taps(logits: Tensor) -> Taps:
    return Taps([], [], logits[:, :0], logits)


def context() -> Context:
    empty = taps(torch.zeros(2, C))
    return Context(empty, empty, None, torch.arange(20) % C, C, seed=0)


def softmax(row: Tensor, temperature: float) -> list[Tensor]:
    powers = [(z / temperature).exp() for z in row]
    return [p / sum(powers) for p in powers]


def restated(student: Tensor, teacher: Tensor, rows: list[list[Tensor]], alpha: float, beta: float) -> Tensor:
    """IKL at T = 1 by its definition, weighed by given rows."""
    total = torch.zeros(()).double()
    for s, t, w in zip(student, teacher, rows, strict=True):
        for j in range(C):
            for k in range(C):
                total = total + 0.25 * alpha * w[j] * w[k] * ((t[j] - t[k]) - (s[j] - s[k])) ** 2
        pairs = zip(softmax(s, 1.0), softmax(t, 1.0), strict=True)
        total = total - beta * sum(q.detach() * p.log() for p, q in pairs)
    return total / B


def test_class_wise_over_three_epochs() -> None:
    """Weights of an epoch are the mean predictions of each class in the one before, uniform in the first; a class that an epoch
    has not shown keeps its row.
    """
    torch.manual_seed(0)
    method = IKLKD(
        context(), alpha=1.5, beta=4.0, temperature=1.0, weights_temperature=2.0, warmup=2, weights="class"
    )
    method = method.double()
    rows = {y: [torch.tensor(1 / C, dtype=torch.float64)] * C for y in range(C)}
    for epoch in (1, 2, 3):
        seen: dict[int, list[list[Tensor]]] = {}
        for _ in range(2):
            student = (3 * torch.randn(B, C, dtype=torch.float64)).requires_grad_()
            teacher, labels = 3 * torch.randn(B, C, dtype=torch.float64), torch.randint(C - 1, (B,))
            ours = method(taps(student), taps(teacher), labels, epoch=epoch, index=labels)[
                "distillation"
            ].mean()
            slow = min(epoch / 2, 1.0) * restated(
                student, teacher, [rows[y] for y in labels.tolist()], 1.5, 4.0
            )
            torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
            gradients = (torch.autograd.grad(value, student)[0] for value in (ours, slow))
            torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
            for t, y in zip(teacher, labels.tolist(), strict=True):
                seen.setdefault(y, []).append(softmax(t, 2.0))
        method.end_epoch()
        rows |= {y: [sum(p[c] for p in found) / len(found) for c in range(C)] for y, found in seen.items()}


def test_the_prior_is_kept_where_it_weighs_and_learns_in_training_alone() -> None:
    """Sample-wise checkpoints, CIFAR-100's and ImageNet-LT's, hold nothing of the method."""
    given: dict[str, Any] = {
        "alpha": 1.0,
        "beta": 1.0,
        "temperature": 4.0,
        "weights_temperature": 1.0,
        "warmup": 1,
    }
    assert not IKLKD(context(), **given).state_dict()
    method = IKLKD(context(), **given, weights="class").eval()
    assert method.state_dict().keys() == {"prior.probs", "prior.sums", "prior.counts"}
    labels = torch.arange(C)
    method(taps(torch.randn(C, C)), taps(torch.randn(C, C)), labels, epoch=1, index=labels)
    assert method.prior is not None and method.prior.counts.sum() == 0
