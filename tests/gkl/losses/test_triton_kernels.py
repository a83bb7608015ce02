"""The Triton kernels without a GPU: run by Triton's interpreter against float64, and compiled for GPUs that are not there.

Triton reads TRITON_INTERPRET when it is imported, so both happen in a process of their own: this file, run as a script.
"""

import inspect
from copy import deepcopy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gkl.losses import closed_form
from gkl.losses.objectives import GKL
from gkl.losses.prior import ClassPrior
from tests.gkl.triton_process import answer, in_a_process, of_each_capability

pytest.importorskip("triton")

BOUND = 3e-7  # of the largest entry of a gradient

COMMON: dict[str, Any] = {"batch": 3, "classes": 100, "gamma": 0.4, "alpha": 20.0, "beta": 4.0}
CASES: dict[str, dict[str, Any]] = {
    f"{classes} classes, offset {offset:g}, temperature {temperature:g}": {
        "batch": 2, "classes": classes, "offset": offset, "temperature": temperature,
    }
    for classes, offset, temperature in product(
        (2, 3, 100, 1000, 1025, 21841), (0.0, 1e4), (1.0, 4.0)
    )
} | {
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 in many blocks": {"dtype": "bfloat16", "classes": 21841, "batch": 2, "temperature": 4.0},
    "float16": {"dtype": "float16"},
    "one example": {"batch": 1},
    "gamma 0": {"gamma": 0.0},
    "gamma 1": {"gamma": 1.0},
    "several programs": {"batch": 40},
    "many programs, the last not full": {"batch": 2500, "classes": 3, "dtype": "float16"},
    "mean": {"batch": 40, "reduction": "mean"},
    "pair weight given": {"pair_weight": 3.5},
    "pair weight of each example": {"pair_weight": [2.0, 3.5, 1.0]},
    "pair weight made of the squares": {"pair_weight": torch.amax},
    "mean, pair weight given": {"pair_weight": 3.5, "reduction": "mean"},
    "mean, pair weight made of the squares": {"pair_weight": torch.amax, "reduction": "mean"},
    "gamma 0 and weights that are zero": {"gamma": 0.0, "layout": "sparse"},
    "gamma 0.4 and weights that are zero": {"layout": "sparse"},
} | {
    f"class rows, {classes} classes, gamma {gamma:g}": {
        "weights": "class", "batch": 30, "classes": classes, "gamma": gamma, "offset": 1e4,
    }
    for classes, gamma in product((3, 100, 1025), (0.0, 0.4, 1.0))
} | {
    f"of the teacher, {classes} classes, gamma {gamma:g}, temperatures {temperature:g} and {softer:g}, {layout}": {
        "weights": None, "batch": 2, "classes": classes, "gamma": gamma, "temperature": temperature,
        "weights_temperature": softer, "offset": -1e4, "layout": layout,
        # Where one weight is nearly all, that class's d is nearly the mean, and their difference loses the digits of d.
        "bound": 3e-6 if layout and gamma == softer == 1.0 else 4e-7 if classes > 4096 else BOUND,
    }
    for (classes, layout), gamma, (temperature, softer) in product(
        ((2, ""), (100, ""), (21841, ""), (9000, "opposed")), (0.0, 0.4, 1.0), ((1.0, 1.0), (4.0, 100.0))
    )
} | {
    f"{name}, offsets {student:g} and {teacher:g}": {
        "weights": weights, "batch": 30, "offset": student, "between": teacher - student, "bound": 4e-7,
    }
    for name, weights in (("class rows", "class"), ("of the teacher", None))
    for student, teacher in ((1e4, 1e4), (-1e4, 1e4), (1e4, -1e4), (0.0, 1e4), (1e4, 0.0))
} | {
    "class rows, mean, bfloat16": {"weights": "class", "batch": 30, "reduction": "mean", "dtype": "bfloat16"},
    "class rows, student alone": {"weights": "class", "wanted": "student"},
    "of the teacher, mean, float16": {"weights": None, "reduction": "mean", "dtype": "float16"},
    "asymmetry kept": {"break_asymmetry": False},
    "student alone": {"wanted": "student"},
    "student alone, asymmetry kept": {"wanted": "student", "break_asymmetry": False},
    "teacher alone": {"wanted": "teacher"},
    "teacher alone, asymmetry kept": {"wanted": "teacher", "break_asymmetry": False},
    "some count": {"counted": True, "batch": 30},
    "some count, mean": {"counted": True, "batch": 30, "reduction": "mean"},
    "some count, class rows, mean, float16": {
        "counted": True, "batch": 30, "weights": "class", "reduction": "mean", "dtype": "float16",
    },
    "some count, of the teacher, student alone": {
        "counted": True, "batch": 30, "weights": None, "wanted": "student", "temperature": 4.0,
    },
    "some count, pair weight made of the squares": {"counted": True, "batch": 30, "pair_weight": torch.amax},
    "some count, pair weight given": {"counted": True, "batch": 30, "pair_weight": 3.5},
    "class rows, the power in the kernel": {"weights": "class", "batch": 30, "anew": True, "offset": 1e4},
    "class rows, the power in the kernel, gamma 0": {"weights": "class", "batch": 30, "anew": True, "gamma": 0.0},
    "columns apart": {"layout": "columns"},
    "rows apart": {"layout": "rows"},
    "weights that share a row": {"layout": "shared", "gamma": 1.0},
    "one maximum comes first, the other last": {"layout": "opposed", "classes": 21841, "batch": 2},
    "weights of whole blocks are zero": {"layout": "sparse", "classes": 21841, "batch": 2, "gamma": 1.0},
}  # fmt: skip


# --- in the process with the interpreter ------------------------------------------------------------------------------


def lay_out(layout: str, student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers, or harder ones, as `layout` says."""
    if layout == "columns":
        student, teacher, weights = (x.t().contiguous().t() for x in (student, teacher, weights))
    if layout == "rows":
        student, teacher, weights = (F.pad(x, (0, 3))[:, :-3] for x in (student, teacher, weights))
    if layout == "shared":
        weights = weights[:1].expand_as(weights)
    if layout == "opposed":
        student, teacher = 5 * student.sort(-1).values, 3 * teacher.sort(-1, descending=True).values
    if layout == "sparse":
        weights = torch.where(torch.arange(weights.shape[1]) % 9000 < 3, weights, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    return student, teacher, weights


def errors(case: dict[str, Any]) -> dict[str, Any]:
    """Each result's largest distance to float64 over what is allowed, and how many further (B, C) tensors backward keeps."""
    case = COMMON | case
    batch, classes, dtype = case["batch"], case["classes"], getattr(torch, case.get("dtype", "float32"))
    generator = torch.Generator().manual_seed(classes)
    student, teacher = 3 * torch.randn(2, batch, classes, dtype=torch.float64, generator=generator)
    weights = F.softmax(2 * torch.randn(batch, classes, generator=generator), -1)
    offset = case.get("offset", 0.0)
    student, teacher = (student + offset).to(dtype), (teacher + offset + case.get("between", 0.0)).to(dtype)
    student, teacher, weights = lay_out(case.get("layout", ""), student, teacher, weights)
    upstream = torch.linspace(-0.5, 2.0, 2 * batch)[::2]
    if case.get("reduction") == "mean":
        upstream = torch.tensor(-1.5)
    prior, labels = ClassPrior(2), torch.arange(batch).flip(0) % min(classes, 7)
    if case.get("weights") == "class":
        prior = ClassPrior(classes)
        prior.probs.copy_(F.softmax(2 * torch.randn(classes, classes, generator=generator), -1))
    pair_weight = case.get("pair_weight")
    if isinstance(pair_weight, list):
        pair_weight = torch.tensor(pair_weight)
    counted = torch.arange(batch) % 3 != 1 if case.get("counted") else None
    if counted is not None:
        student[~counted], teacher[~counted], labels[~counted] = torch.nan, -torch.inf, 255
    options = {name: case[name] for name in case if name in inspect.signature(closed_form.gkl).parameters}
    options = {"reduction": "none", **options, "pair_weight": pair_weight, "counted": counted}
    found, kept = [], []
    for fused, precise in ((True, lambda x: x.detach()), (False, lambda x: x.detach().double())):
        inputs = {"student": precise(student), "teacher": precise(teacher)}
        if case.get("weights") == "class":
            options["weights"] = (prior if fused else deepcopy(prior).double()).at(labels)
        wanted = [x.requires_grad_() for name, x in inputs.items() if case.get("wanted", name) == name]
        with (
            mock.patch.object(closed_form, "_fused", return_value=fused),
            mock.patch.object(ClassPrior, "is_read_anew", return_value=case.get("anew", False)),
            torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        ):
            value = closed_form.gkl(*inputs.values(), **{"weights": precise(weights), **options})
        found.append((value.detach(), *torch.autograd.grad(value, wanted, precise(upstream))))
        if fused:
            given = [x.data_ptr() for x in (student, teacher, weights, prior.table(case["gamma"])[0])]
            copies = sum(x.numel() >= student.numel() and x.data_ptr() not in given for x in kept)
    ratios = []
    for mine, exact in zip(*found, strict=True):
        allowed = case.get("bound", BOUND) * exact.abs().max()
        if (
            mine.dtype != torch.float32
        ):  # the interpreter cuts bfloat16 off, where a GPU rounds it as float16 is here
            units = 1.0 if mine.dtype == torch.bfloat16 else 0.5
            allowed = allowed + units * torch.finfo(mine.dtype).eps * exact.abs().log2().floor().exp2()
        ratios.append(((mine.double() - exact).abs() / allowed).max().item())
    return {"ratios": ratios, "dtypes": [str(x.dtype) for x in found[0]], "copies": copies}


def derivatives() -> dict[str, Any]:
    """What a second derivative of each kind of weights comes to, and how far many gradients at once are from one by one."""
    found: dict[str, Any] = {}
    prior, labels = ClassPrior(4), torch.arange(3)
    pair = torch.randn(2, 3, 4).requires_grad_().unbind()
    for (name, weights), reduction in product(
        {"rows": prior[labels], "class": prior.at(labels), "sample": None}.items(), ("mean", "none")
    ):
        with mock.patch.object(closed_form, "_fused", return_value=True):
            value = closed_form.gkl(*pair, weights, alpha=20.0, beta=4.0, gamma=0.4, reduction=reduction)
        several = torch.randn(2, *value.shape)
        together = torch.autograd.grad(value, pair, several, retain_graph=True, is_grads_batched=True)
        alone = [torch.autograd.grad(value, pair, each, retain_graph=True) for each in several]
        distances = [
            (x - torch.stack(y)).abs().max().item()
            for x, y in zip(together, zip(*alone, strict=True), strict=True)
        ]
        try:
            message = str(torch.autograd.grad(value.sum(), pair, create_graph=True))
        except RuntimeError as error:
            message = str(error)
        found[f"{name}, {reduction}"] = [max(distances), message]
    return found


# --- in the process that compiles -------------------------------------------------------------------------------------


def compiled_sizes(capability: int) -> dict[str, int]:
    """Bytes of machine code of each kernel, as ptxas makes it for a compute capability.

    With float scalars as Triton passes them and as torch.compile does, strides and sizes of 32 and of 64 bits.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gkl.losses import triton_kernels as kernels

    sizes = {}
    types = dict.fromkeys(("weights", "statistics", "value", "pair_weight", "grad"), "*fp32")
    types |= {"labels": "*i64", "counter": "*i32"}
    scalars = ("alpha", "beta", "gamma", "inverse_temperature", "weights_inverse", "entropy_scale")
    forward = {"power": False, "finish": True, "own": True, "mean_alone": True, "ROWS": 1, "BLOCK": 4096}
    backward = {"power": False, "mean_alone": True, "break_asymmetry": True, "ROWS": 1, "BLOCK": 1024}
    variants = (
        {},  # class rows
        {"labels": None, "power": True, "mean_alone": False, "ROWS": 8, "BLOCK": 128},
        {"labels": None, "weights": None, "own": False, "break_asymmetry": False, "to_teacher": None},
    )
    for dtype, real, integer in (("fp32", "fp32", "i32"), ("bf16", "fp32", "i32"), ("fp32", "fp64", "i64")):
        types |= dict.fromkeys(scalars, real)
        logits = dict.fromkeys(("student", "teacher", "to_student", "to_teacher"), f"*{dtype}")
        for (kernel, common), variant in product(
            ((kernels._forward, forward), (kernels._backward, backward)), variants
        ):
            constants = {name: x for name, x in (common | variant).items() if name in kernel.arg_names}
            signature = {name: (types | logits).get(name, integer) for name in kernel.arg_names}
            signature |= dict.fromkeys(constants, "constexpr")
            binary = triton.compile(
                ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32)
            )
            sizes[f"{kernel.__name__} {dtype} {real} {constants}"] = len(binary.asm["cubin"])
    return sizes


# --- in the process that traces ---------------------------------------------------------------------------------------


class NoGPU:
    """The driver that Triton asks for its target."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def loss_of(weights: str, prior: ClassPrior) -> Any:
    """The loss of (student, teacher, rows, labels) with weights that are `rows`, the prior's (class) or the teacher's (sample)."""
    objective = GKL(20.0, 4.0, 0.4, weights="sample" if weights == "sample" else "class")

    def of_rows(student: Tensor, teacher: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        return closed_form.gkl(student, teacher, rows, alpha=20.0, beta=4.0, gamma=0.4, validate=False)

    def chosen(student: Tensor, teacher: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        return objective(student, teacher, labels, prior).sum()

    return of_rows if weights == "rows" else chosen


def traced() -> dict[str, list[int]]:
    """Launches in each graph that torch.compile makes of two batches of two sizes, on tensors that only claim to lie on a GPU."""
    import triton
    from torch._dynamo.variables.ctx_manager import CUDADeviceVariable
    from torch.utils import _triton

    hopper = SimpleNamespace(major=9)
    _triton.has_triton = lambda *device: True
    triton.runtime.driver.set_active(NoGPU())
    torch.cuda.get_device_properties = lambda device: hopper
    CUDADeviceVariable._exchange_fn = CUDADeviceVariable._maybe_exchange_fn = staticmethod(lambda device: 0)
    found, graphs = {}, []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nodes = [node for each in graph.modules() for node in getattr(each, "graph", graph.graph).nodes]
        graphs.append(sum("gkl.closed_form" in str(node.target) for node in nodes))
        return graph.forward

    for dtype, dynamic, weights in product(
        ("float32", "bfloat16"), (False, True), ("rows", "class", "sample")
    ):
        torch.compiler.reset()
        graphs.clear()
        with FakeTensorMode():
            prior = ClassPrior(100).cuda()
            prior.table(0.4)

            compiled = torch.compile(
                loss_of(weights, prior), backend=compiler, fullgraph=True, dynamic=dynamic
            )
            for batch in (64, 40):
                logits = (
                    torch.empty(batch, 100, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
                    for _ in range(2)
                )
                rows = torch.empty(batch, 100, device="cuda")
                compiled(*logits, rows, torch.empty(batch, dtype=torch.int64, device="cuda"))
        found[f"{dtype}, {weights}, {'dynamic' if dynamic else 'static'}"] = list(graphs)
    return found


# --- in the process of the tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    return in_a_process(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.long  # the interpreter goes through every case line by line
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_closed_form_in_float64(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    found, case = interpreted[name], CASES[name]
    assert len(found["ratios"]) == (2 if "wanted" in case else 3)
    assert max(found["ratios"]) <= 1.0, found["ratios"]
    assert found["dtypes"][0] == "torch.float32"
    assert set(found["dtypes"][1:]) == {f"torch.{case.get('dtype', 'float32')}"}


@pytest.mark.long  # of the same interpreted cases
def test_nothing_of_the_logits_size_is_copied(interpreted: dict[str, dict[str, Any]]) -> None:
    """Backward keeps the logits, the weights and the prior's table themselves, and the statistics, 9 numbers a row."""
    for name in (
        "gamma 1",
        "rows apart",
        "bfloat16",
        "class rows, student alone",
        "of the teacher, mean, float16",
    ):
        assert interpreted[name]["copies"] == 0, name


def test_a_second_derivative_of_the_kernels_is_refused_and_many_first_ones_are_not() -> None:
    for name, (distance, message) in in_a_process(__file__, "derive", TRITON_INTERPRET="1").items():
        assert distance < 1e-5, name
        assert "pass create_graph=True to the loss too" in message and "\n" not in message, (name, message)


def test_what_is_to_be_differentiated_twice_does_not_go_to_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(closed_form, "_fused", lambda *tensors: True)
    monkeypatch.setattr(closed_form, "_by_kernels", pytest.fail)
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    options: dict[str, Any] = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4}
    twice = torch.func.hessian(lambda s: closed_form.gkl(s, teacher, None, **options))(student)
    again = torch.autograd.functional.hessian(
        lambda s: closed_form.gkl(s, teacher, None, **options, create_graph=True), student
    )
    torch.testing.assert_close(twice, again)


@pytest.mark.long  # compiles for two GPUs
def test_kernels_compile_for_gpus_of_two_generations(tmp_path: Path) -> None:
    for sizes in in_a_process(__file__, "compile", TRITON_CACHE_DIR=str(tmp_path)).values():
        assert len(sizes) == 18 and min(sizes.values()) > 0


@pytest.mark.long  # compiles
def test_torch_compile_traces_them_whole_and_once_for_all_batches() -> None:
    """Forward's and backward's kernel in one graph; with dynamic shapes one graph for every batch size."""
    for name, kernels in in_a_process(__file__, "trace", CUDA_VISIBLE_DEVICES="").items():
        assert kernels == ([2] if "dynamic" in name else [2, 2]), (name, kernels)


def test_the_kernels_take_what_they_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that only claim to lie on a GPU."""
    ampere, pascal = SimpleNamespace(major=8), SimpleNamespace(major=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: ampere)
    with FakeTensorMode():
        single, half, double = (
            torch.empty(2, 3, device="cuda", dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float64)
        )
        assert closed_form._fused(single, single, single) and closed_form._fused(half, single, single)
        assert closed_form._fused(half, half, double)
        assert not closed_form._fused(double, double, double) and not closed_form._fused(
            single, double, single
        )
        assert not closed_form._fused(single, single, single.cpu()) and not closed_form._fused(
            *[single.cpu()] * 3
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: pascal)
        assert not closed_form._fused(single, single, single)


def test_the_choice_breaks_no_graph_of_torch_compile() -> None:
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    weights = F.softmax(teacher, -1)

    def loss(student: Tensor) -> Tensor:
        return closed_form.gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=0.4, validate=False)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student), loss(student))


if __name__ == "__main__":
    answer(
        interpret=lambda: {name: errors(case) for name, case in CASES.items()},
        derive=derivatives,
        compile=lambda: of_each_capability(compiled_sizes),
        trace=traced,
    )
