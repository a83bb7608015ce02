"""The same numbers on a GPU: integers to the bit, float32 to its rounding."""

import pytest
import torch

from gkl.augment import Views
from gkl.counter import sample_keys, uniform
from gkl.losses import gkl, jsd, kl

pytestmark = pytest.mark.gpu


def test_random_numbers_and_views_are_the_cpu_s() -> None:
    index = torch.arange(64)
    images = torch.randint(
        0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    keys = sample_keys(0, 1, index, "a")
    assert sample_keys(0, 1, index.cuda(), "a").cpu().equal(keys)
    assert uniform(keys.cuda(), 5).cpu().equal(uniform(keys, 5))
    here = Views(["crop_flip", "autoaugment"])(images, seed=0, epoch=1, index=index)
    there = Views(["crop_flip", "autoaugment"])(images.cuda(), seed=0, epoch=1, index=index.cuda())
    assert there[0].cpu().equal(here[0])
    assert (
        there[1].cpu().int() - here[1].int()
    ).abs().float().mean() < 1.0  # rounding of the colour operations


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_losses_are_the_cpu_s(gamma: float) -> None:
    logits = 5 * torch.randn(2, 128, 100, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        student, teacher = (x.to(device).requires_grad_() for x in logits)
        weights = teacher.detach().softmax(-1)
        value = gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=gamma)
        value = value + kl(student, teacher) + jsd(student, teacher)
        found.append([x.cpu() for x in (value.detach(), *torch.autograd.grad(value, (student, teacher)))])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6)
