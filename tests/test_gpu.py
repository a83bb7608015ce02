"""The same numbers on a GPU: integers to the bit, float32 to its rounding."""

import pytest
import torch

from gkl import losses
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


def logits_and_weights(
    batch: int, classes: int, dtype: torch.dtype, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 3 * torch.randn(2, batch, classes, device="cuda", generator=generator) + offset
    weights = (2 * torch.randn(batch, classes, device="cuda", generator=generator)).softmax(-1)
    student, teacher = (x.to(dtype).requires_grad_() for x in logits)
    return student, teacher, weights


@pytest.mark.parametrize(("batch", "classes"), [(128, 2), (128, 100), (512, 1000), (64, 21841)])
@pytest.mark.parametrize(
    ("dtype", "offset", "temperature"),
    [
        (torch.float32, 0.0, 1.0),
        (torch.float32, 1e4, 4.0),
        (torch.bfloat16, 0.0, 4.0),
        (torch.float16, 0.0, 1.0),
    ],
)
def test_kernels_are_the_closed_form_in_float64(
    batch: int, classes: int, dtype: torch.dtype, offset: float, temperature: float
) -> None:
    student, teacher, weights = logits_and_weights(batch, classes, dtype, offset)
    options = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4, "temperature": temperature, "reduction": "none"}
    assert losses._fused(student, teacher, weights)
    found = []
    for cast in (torch.Tensor.clone, torch.Tensor.double):
        inputs = [cast(x.detach()).requires_grad_() for x in (student, teacher)]
        value = gkl(*inputs, cast(weights), **options)
        upstream = torch.linspace(-0.5, 2.0, batch, device="cuda", dtype=value.dtype)
        found.append((value.detach(), *torch.autograd.grad(value, inputs, upstream)))
    for mine, exact in zip(*found, strict=True):
        rounding = 0.0 if mine.dtype == torch.float32 else torch.finfo(dtype).eps / 2
        # 1e-6 where the interpreter's test has 3e-7: the exponential of a GPU may be two units in the last place off.
        torch.testing.assert_close(mine.double(), exact, rtol=rounding, atol=1e-6 * exact.abs().max().item())


def test_kernels_are_traced_whole() -> None:
    student, teacher, weights = logits_and_weights(64, 100, torch.float32)

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=0.4, validate=False)

    found = [
        torch.autograd.grad(function(student, teacher), (student, teacher))
        for function in (loss, torch.compile(loss, fullgraph=True))
    ]
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_step_is_that_of_its_two_gradients(dtype: torch.dtype) -> None:
    student, teacher, weights = logits_and_weights(16384, 150, dtype)

    def step() -> None:
        value = gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=1.0, validate=False)
        torch.autograd.grad(value, (student, teacher))

    step()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 2.5 * student.numel() * student.element_size()
