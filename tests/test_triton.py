"""The Triton kernels without a GPU: run by Triton's interpreter against float64, and compiled for GPUs that are not there.

Triton reads TRITON_INTERPRET when it is imported, so both happen in a process of their own: this file, run as a script.
"""

import inspect
import json
import os
import subprocess
import sys
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

from gkl import losses

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
    "pair weight given": {"pair_weight": 3.5},
    "pair weight of each example": {"pair_weight": [2.0, 3.5, 1.0]},
    "weights of the teacher": {"weights": None},
    "asymmetry kept": {"break_asymmetry": False},
    "student alone": {"wanted": "student"},
    "student alone, asymmetry kept": {"wanted": "student", "break_asymmetry": False},
    "teacher alone": {"wanted": "teacher"},
    "teacher alone, asymmetry kept": {"wanted": "teacher", "break_asymmetry": False},
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
    """Each result's largest distance to float64 over what is allowed, and how many (B, C) copies backward keeps."""
    case = COMMON | case
    batch, classes, dtype = case["batch"], case["classes"], getattr(torch, case.get("dtype", "float32"))
    generator = torch.Generator().manual_seed(classes)
    student, teacher = 3 * torch.randn(2, batch, classes, dtype=torch.float64, generator=generator)
    weights = F.softmax(2 * torch.randn(batch, classes, generator=generator), -1)
    student, teacher = ((x + case.get("offset", 0.0)).to(dtype) for x in (student, teacher))
    student, teacher, weights = lay_out(case.get("layout", ""), student, teacher, weights)
    upstream = torch.linspace(-0.5, 2.0, 2 * batch)[::2]
    pair_weight = case.get("pair_weight")
    if isinstance(pair_weight, list):
        pair_weight = torch.tensor(pair_weight)
    options = {name: case[name] for name in case if name in inspect.signature(losses.gkl).parameters}
    options |= {"pair_weight": pair_weight, "reduction": "none"}
    found, kept = [], []
    for fused, precise in ((True, lambda x: x.detach()), (False, lambda x: x.detach().double())):
        inputs = {"student": precise(student), "teacher": precise(teacher)}
        wanted = [x.requires_grad_() for name, x in inputs.items() if case.get("wanted", name) == name]
        with (
            mock.patch.object(losses, "_fused", return_value=fused),
            torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        ):
            value = losses.gkl(*inputs.values(), **{"weights": precise(weights), **options})
        found.append((value.detach(), *torch.autograd.grad(value, wanted, precise(upstream))))
        if fused:
            given = [x.data_ptr() for x in (student, teacher, weights)]
            copies = sum(x.numel() >= student.numel() and x.data_ptr() not in given for x in kept)
    ratios = []
    for mine, exact in zip(*found, strict=True):
        allowed = BOUND * exact.abs().max()
        if (
            mine.dtype != torch.float32
        ):  # the interpreter cuts bfloat16 off, where a GPU rounds it as float16 is here
            units = 1.0 if mine.dtype == torch.bfloat16 else 0.5
            allowed = allowed + units * torch.finfo(mine.dtype).eps * exact.abs().log2().floor().exp2()
        ratios.append(((mine.double() - exact).abs() / allowed).max().item())
    return {"ratios": ratios, "dtypes": [str(x.dtype) for x in found[0]], "copies": copies}


# --- in the process that compiles -------------------------------------------------------------------------------------


def compiled_sizes(capability: int) -> dict[str, int]:
    """Bytes of machine code of each kernel, as ptxas makes it for a compute capability.

    With float scalars as Triton passes them and as torch.compile does, strides and sizes of 32 and of 64 bits.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gkl import triton_losses

    sizes = {}
    types = dict.fromkeys(("smoothed", "statistics", "scale", "grad"), "*fp32")
    for dtype, real, integer in (("fp32", "fp32", "i32"), ("bf16", "fp32", "i32"), ("fp32", "fp64", "i64")):
        types |= dict.fromkeys(("inverse_temperature", "entropy_scale"), real)
        logits = dict.fromkeys(("student", "teacher", "to_student", "to_teacher"), f"*{dtype}")
        for kernel, constants in (
            (triton_losses._forward, {"BLOCK": 4096}),
            (triton_losses._backward, {"BLOCK": 1024, "break_asymmetry": True}),
            (triton_losses._backward, {"BLOCK": 128, "break_asymmetry": False, "to_teacher": None}),
        ):
            signature = {name: (types | logits).get(name, integer) for name in kernel.arg_names}
            signature |= dict.fromkeys(constants, "constexpr")
            binary = triton.compile(
                ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32)
            )
            sizes[f"{kernel.__name__} {dtype} {real} {constants}"] = len(binary.asm["cubin"])
    return sizes


# --- in the process of the tests --------------------------------------------------------------------------------------


def child(mode: str, **environment: str) -> Any:
    """What this file prints as a script."""
    root = Path(__file__).parents[1]
    outer = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, __file__, mode],
        env=outer | {"PYTHONPATH": str(root)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    return child("interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_closed_form_in_float64(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    found, case = interpreted[name], CASES[name]
    assert len(found["ratios"]) == (2 if "wanted" in case else 3)
    assert max(found["ratios"]) <= 1.0, found["ratios"]
    assert found["dtypes"][0] == "torch.float32"
    assert set(found["dtypes"][1:]) == {f"torch.{case.get('dtype', 'float32')}"}


def test_nothing_of_the_logits_size_is_copied(interpreted: dict[str, dict[str, Any]]) -> None:
    """Backward keeps the logits and weights themselves; only smoothing makes new weights."""
    assert interpreted["gamma 1"]["copies"] == 0
    assert interpreted["rows apart"]["copies"] == interpreted["bfloat16"]["copies"] == 1


def test_kernels_compile_for_gpus_of_two_generations(tmp_path: Path) -> None:
    for sizes in child("compile", TRITON_CACHE_DIR=str(tmp_path)).values():
        assert len(sizes) == 9 and min(sizes.values()) > 0


def test_the_kernels_take_what_they_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that only claim to lie on a GPU."""
    ampere, pascal = SimpleNamespace(major=8), SimpleNamespace(major=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: ampere)
    with FakeTensorMode():
        single, half, double = (
            torch.empty(2, 3, device="cuda", dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float64)
        )
        assert losses._fused(single, single, single) and losses._fused(half, single, single)
        assert losses._fused(half, half, double)
        assert not losses._fused(double, double, double) and not losses._fused(single, double, single)
        assert not losses._fused(single, single, single.cpu()) and not losses._fused(*[single.cpu()] * 3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: pascal)
        assert not losses._fused(single, single, single)


def test_the_choice_breaks_no_graph_of_torch_compile() -> None:
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    weights = F.softmax(teacher, -1)

    def loss(student: Tensor) -> Tensor:
        return losses.gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=0.4, validate=False)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student), loss(student))


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        print(json.dumps({f"sm_{capability}": compiled_sizes(capability) for capability in (86, 90)}))
    else:
        print(json.dumps({name: errors(case) for name, case in CASES.items()}))
