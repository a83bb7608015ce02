"""GKL on a GPU: the kernels' results, what torch.compile and CUDA graphs make of them, their memory and their launches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gkl.losses import closed_form
from gkl.losses.closed_form import gkl
from gkl.losses.objectives import GKL
from gkl.losses.prior import ClassPrior

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4, "validate": False}
WEIGHTS = ("rows", "class", "sample")


class Case:
    """Logits, labels, a prior that is not uniform, and the weights in each of their forms."""

    def __init__(
        self, batch: int, classes: int, dtype: torch.dtype = torch.float32, device: str = "cuda"
    ) -> None:
        generator = torch.Generator().manual_seed(classes)
        logits = 3 * torch.randn(2, batch, classes, generator=generator).to(dtype)
        self.student, self.teacher = (x.to(device).requires_grad_() for x in logits)
        self.labels = torch.randint(classes, (batch,), generator=generator).to(device)
        self.prior = ClassPrior(classes)
        self.prior.probs.copy_((2 * torch.randn(classes, classes, generator=generator)).softmax(-1))
        self.prior.to(device)

    def weights(self, kind: str) -> Any:
        return {"rows": self.prior[self.labels], "class": self.prior.at(self.labels), "sample": None}[kind]

    def gradients(self, value: Tensor) -> list[Tensor]:
        upstream = torch.linspace(-0.5, 2.0, value.numel(), device=value.device).view_as(value)
        return [
            value.detach(),
            *torch.autograd.grad(value, (self.student, self.teacher), upstream.to(value.dtype)),
        ]


def close(found: list[Tensor], exact: list[Tensor]) -> None:
    for mine, other in zip(found, exact, strict=True):
        half = torch.finfo(mine.dtype) if mine.dtype != torch.float32 else None
        rounding = half.eps / 2 if half else 0.0
        # The exponential of a GPU may be two units in the last place off; below half precision's normal numbers all are as far
        # apart as the smallest ones.
        atol = 1e-6 * other.abs().max().item() + (half.smallest_normal * half.eps / 2 if half else 0.0)
        torch.testing.assert_close(mine.double().cpu(), other.double().cpu(), rtol=rounding, atol=atol)


@pytest.mark.parametrize(("batch", "classes"), [(128, 100), (129, 2), (2048, 1000), (16384, 150), (64, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_are_float64_on_the_cpu(
    batch: int, classes: int, dtype: torch.dtype, weights: str, reduction: Any
) -> None:
    found = []
    for device, precision in (("cuda", dtype), ("cpu", torch.float64)):
        case = Case(batch, classes, dtype, device)
        if device == "cpu":
            case.student, case.teacher = (
                x.detach().double().requires_grad_() for x in (case.student, case.teacher)
            )
            case.prior.double()
        chosen = case.weights(weights)
        assert closed_form._fused(case.student, case.teacher, chosen) == (device == "cuda")
        value = gkl(case.student, case.teacher, chosen, **OPTIONS, temperature=2.0, reduction=reduction)
        found.append(case.gradients(value))
        assert found[-1][1].dtype == precision
    close(*found)


@pytest.mark.parametrize("weights", ["class", "sample"])
def test_the_last_program_is_the_last_every_time(weights: str) -> None:
    """Many launches, on two streams at once: the counters come back to zero, and the sums do not depend on who comes last."""
    case = Case(4096, 100)
    chosen = case.weights(weights)
    with torch.no_grad():
        first = gkl(case.student, case.teacher, chosen, **OPTIONS)
        torch.cuda.synchronize()
        streams, values = [torch.cuda.Stream() for _ in range(2)], []
        for _ in range(300):
            for stream in streams:
                with torch.cuda.stream(stream):
                    values.append(gkl(case.student, case.teacher, chosen, **OPTIONS))
        torch.cuda.synchronize()
    assert all(value.equal(first) for value in values)


def test_a_label_that_is_no_class_makes_nan() -> None:
    case = Case(8, 10)
    case.labels[3] = -1
    values = GKL(20.0, 4.0, 0.4)(case.student, case.teacher, case.labels, case.prior)
    assert values.isnan().any()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_torch_compile_takes_it_whole(dynamic: bool, dtype: torch.dtype, weights: str) -> None:
    torch.compiler.reset()
    prior = Case(1, 100).prior
    objective = GKL(20.0, 4.0, 0.4, weights="sample" if weights == "sample" else "class")

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        if weights == "rows":
            return gkl(student, teacher, prior[labels], **OPTIONS)
        return objective(student, teacher, labels, prior).mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for batch in (64, 40, 129):
        case = Case(batch, 100, dtype)
        plain, whole = (
            case.gradients(function(case.student, case.teacher, case.labels)) for function in (loss, compiled)
        )
        for mine, other in zip(whole, plain, strict=True):
            rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(mine, other, rtol=rounding, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("weights", ["class", "sample"])
def test_a_captured_graph_sees_the_new_logits_and_the_new_epoch(weights: str) -> None:
    case, later = Case(256, 100), Case(256, 100)
    objective = GKL(20.0, 4.0, 0.4, weights=weights)
    with torch.no_grad():
        later.student += 1.0 + torch.rand_like(later.student)

    def step(case: Case) -> list[Tensor]:
        value = objective(case.student, case.teacher, case.labels, case.prior).sum()
        return [value, *torch.autograd.grad(value, (case.student, case.teacher))]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(case)
    for each in (case, later):
        each.prior.update(3 * later.teacher.detach(), later.labels)
        each.prior.renew()
    with torch.no_grad():
        case.student.copy_(later.student)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        for mine, other in zip(found, step(later), strict=True):
            assert mine.equal(other)


def launches(call: Callable[[], object]) -> list[str]:
    """The names of the kernels, copies and fills that a call runs on the GPU."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return [e.name for e in recorded.events() if e.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_step_is_one_launch_each_way(weights: str) -> None:
    case = Case(128, 100)
    chosen = case.weights(weights)

    def step() -> None:
        value = gkl(case.student, case.teacher, chosen, **OPTIONS)
        torch.autograd.grad(value, (case.student, case.teacher), one)

    one = torch.ones((), device="cuda")
    found = launches(step)
    assert len(found) == 2 and "_forward" in found[0] and "_backward" in found[1], found


@pytest.mark.parametrize("weights", ["class", "sample"])
def test_the_objective_as_trainers_call_it_adds_its_mean_alone(weights: str) -> None:
    case = Case(128, 100)
    objective = GKL(20.0, 4.0, 0.4, weights=weights)

    def step() -> None:
        value = objective(case.student, case.teacher, case.labels, case.prior).mean()
        torch.autograd.grad(value, (case.student, case.teacher), one)

    one = torch.ones((), device="cuda")
    found = launches(step)
    assert len(found) == 4, found  # the kernels, the mean, and the mean's gradient


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_the_two_gradients(weights: str, dtype: torch.dtype) -> None:
    case = Case(16384, 150, dtype)
    chosen = case.weights(weights)

    def step() -> None:
        torch.autograd.grad(gkl(case.student, case.teacher, chosen, **OPTIONS), (case.student, case.teacher))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    logits = case.student.numel() * case.student.element_size()
    assert extra <= 2 * logits + 64 * 16384, extra / logits  # and ten numbers a row
