"""Batch norm's Triton kernels without a GPU: run by Triton's interpreter against float64, and compiled for GPUs that are not there.

As in test_triton_kernels.py both happen in a process of their own: this file, run as a script.
"""

import copy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gkl.models import batch_norm
from gkl.models.batch_norm import GhostBatchNorm2d, activated, ghost_batch_norm, split_batch_norm
from tests.gkl.triton_process import answer, in_a_process, of_each_capability

pytest.importorskip("triton")

BOUND = 1e-6  # of the largest entry
ACTIVATIONS = {"none": None, "relu": F.relu, "silu": F.silu}

COMMON: dict[str, Any] = {
    "shape": (6, 24, 4, 4), "groups": 1, "mode": "train", "activation": "relu", "dtype": "float32", "wanted": "xwb",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    f"{mode}, {groups} groups, {activation}": {"mode": mode, "groups": groups, "activation": activation}
    for mode, groups, activation in product(("train", "frozen", "eval"), (1, 4), ACTIVATIONS)
} | {
    "float16": {"dtype": "float16", "groups": 2},
    "bfloat16": {"dtype": "bfloat16", "groups": 2},
    "bfloat16, silu": {"dtype": "bfloat16", "groups": 2, "activation": "silu"},
    "bfloat16, eval": {"dtype": "bfloat16", "mode": "eval"},
    "the last group has one picture": {"shape": (7, 16, 3, 3), "groups": 4},
    "fewer groups than asked for": {"shape": (5, 16, 3, 3), "groups": 4},
    "chunks of a given size": {"shape": (7, 16, 3, 3), "groups": 4, "group_size": 3},
    "more groups than pictures": {"shape": (3, 16, 3, 3), "groups": 4},
    "many tiles, one cut short": {"shape": (9, 32, 13, 7), "groups": 2},
    "a group with fewer tiles than programs": {"shape": (9, 128, 8, 8), "groups": 2, "group_size": 8},
    "blocks of columns": {"shape": (4, 160, 5, 5), "groups": 2},
    "columns cut short": {"shape": (4, 58, 5, 5), "groups": 2},
    "three channels": {"shape": (4, 3, 5, 5), "groups": 2},
    "one channel": {"shape": (4, 1, 5, 5), "groups": 2},
    "one pixel": {"shape": (12, 40, 1, 1), "groups": 3},
    "a mean of 100 deviations": {"shape": (8, 16, 16, 16), "groups": 2, "offset": 100.0, "activation": "none"},
    "a first pixel of 5 deviations": {"shape": (8, 16, 16, 16), "groups": 2, "outlier": 5.0, "activation": "none"},
    "momentum 1": {"groups": 4, "momentum": 1.0},
    "images alone": {"groups": 4, "wanted": "x"},
    "images alone, eval": {"mode": "eval", "wanted": "x"},
    "images alone, eval, none": {"mode": "eval", "wanted": "x", "activation": "none"},
    "parameters alone": {"groups": 4, "wanted": "wb"},
    "the bias alone, eval": {"mode": "eval", "wanted": "b"},
}  # fmt: skip


def made(case: dict[str, Any], device: str = "cpu") -> tuple[GhostBatchNorm2d, Tensor, Tensor]:
    """A batch norm as the case has it, its map and the gradient to its output."""
    generator = torch.Generator(device).manual_seed(0)
    shape = case["shape"]
    scale = torch.linspace(0.5, 2.0, shape[1], device=device)[:, None, None]
    x = (torch.randn(shape, generator=generator, device=device) + case.get("offset", 0.3)) * scale
    x[0, :, 0, 0] += case.get("outlier", 0.0)
    norm = nn.BatchNorm2d(shape[1], momentum=case.get("momentum", 0.1), device=device)
    ghost_batch_norm(norm, case["groups"])
    norm.group_size = case.get("group_size", 0)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.copy_(torch.randn(tensor.shape, generator=generator, device=device))
    norm.running_var.uniform_(0.5, 2.0, generator=generator)
    norm.train(case["mode"] != "eval")
    norm.track_running_stats = case["mode"] != "frozen"
    norm.weight.requires_grad_("w" in case["wanted"])
    norm.bias.requires_grad_("b" in case["wanted"])
    x = x.to(getattr(torch, case["dtype"])).contiguous(memory_format=torch.channels_last)
    return norm, x, torch.randn(shape, generator=generator, device=device).to(x.dtype)


def results(norm: GhostBatchNorm2d, x: Tensor, slope: Tensor, case: dict[str, Any]) -> dict[str, Tensor]:
    """Output, buffers and gradients."""
    x = x.detach().clone().requires_grad_("x" in case["wanted"])
    activation = ACTIVATIONS[case["activation"]]
    y = norm(x) if activation is None else activated(norm, x, activation)
    y.backward(slope)
    found = {"y": y.detach(), **dict(norm.named_buffers())}
    gradients = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return found | {f"to {name}": grad for name, grad in gradients.items() if grad is not None}


# --- in the process with the interpreter ------------------------------------------------------------------------------


def errors(case: dict[str, Any]) -> dict[str, Any]:
    """Each result's largest distance to torch's float64 over what is allowed."""
    case = COMMON | case
    norm, x, slope = made(case)
    exact = results(copy.deepcopy(norm).double(), x.double(), slope.double(), case)
    untouched = x.clone()
    with mock.patch.object(batch_norm, "_fused", return_value=True):
        mine = results(norm, x, slope, case)
        again = results(copy.deepcopy(norm).eval(), x, slope, case)["y"]
        same = results(copy.deepcopy(norm).eval(), x, slope, case)["y"].equal(again)
    assert mine.keys() == exact.keys() and untouched.equal(x)
    ratios = {}
    for name, value in mine.items():
        wanted = exact[name].double()
        allowed = BOUND * wanted.abs().max() + 1e-30
        if value.dtype in (torch.bfloat16, torch.float16):  # the interpreter cuts bfloat16 off
            units = 1.0 if value.dtype == torch.bfloat16 else 0.5
            allowed = allowed + units * torch.finfo(value.dtype).eps * wanted.abs().log2().floor().exp2()
            allowed = allowed.clamp(min=torch.finfo(value.dtype).smallest_normal)
        ratios[name] = ((value.double() - wanted).abs() / allowed).max().item()
    layout = mine["y"].stride() == x.stride() and mine.get("to x", x).stride() == x.stride()
    return {"ratios": ratios, "dtype": str(mine["y"].dtype), "layout": layout, "same": same}


# --- in the process that compiles -------------------------------------------------------------------------------------


def compiled_sizes(capability: int) -> dict[str, int]:
    """Bytes of machine code of each kernel, with scalars as Triton passes them and as torch.compile does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gkl.models import triton_batch_norm as kernels

    tile = {"BLOCK_R": 128, "BLOCK_C": 32}
    sizes = {}
    numbers = ("rows", "group_rows", "channels", "groups", "splits")
    for dtype, real, integer in (
        ("bf16", "fp32", "i32"),
        ("fp16", "fp64", "i64"),
        ("fp32", "fp64", "i32"),
        ("bf16", "fp32", "constexpr"),  # Triton makes a constant of a 1
    ):
        types = dict.fromkeys(("x", "y", "grad", "to_x"), f"*{dtype}")
        types |= dict.fromkeys(("eps", "momentum"), real) | {"batches": "*i64"}
        ones = dict.fromkeys(numbers, 1) if integer == "constexpr" else {}
        for kernel, constants in (
            (kernels._moments, tile),
            (kernels._statistics, {"TRACKED": True, "BLOCK_R": 128, "BLOCK_S": 128, "BLOCK_C": 16}),
            (kernels._statistics, {"TRACKED": False, "BLOCK_R": 128, "BLOCK_S": 512, "BLOCK_C": 8}),
            *(
                (kernel, tile | {"BY_BATCH": by_batch, "ACTIVATION": activation})
                for kernel in (kernels._normalise, kernels._slopes, kernels._gradient)
                for by_batch, activation in ((True, 1), (False, 0), (False, 2))
            ),
            *((kernels._sums, {"BY_BATCH": by_batch, "BLOCK_S": 128, "BLOCK_C": 16}) for by_batch in (True, False)),
        ):  # fmt: skip
            signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
            signature |= dict.fromkeys(set(numbers) & signature.keys(), integer)
            signature |= dict.fromkeys(constants, "constexpr")
            fixed = constants | {name: 1 for name in ones if name in signature}
            binary = triton.compile(
                ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", capability, 32)
            )
            sizes[f"{kernel.__name__} {dtype} {integer} {constants}"] = len(binary.asm["cubin"])
    return sizes


# --- in the process that traces ---------------------------------------------------------------------------------------


def traced_calls() -> dict[str, int]:
    """How often the graph that torch.compile makes of a network calls the kernels' autograd function, by mode.

    On tensors that only claim to lie on a GPU; what asks for the GPU itself is told that there is one.
    """
    import contextlib

    import torch.utils._triton

    import gkl.models

    class Card:
        major = 9

    card, found = Card(), {}

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = [node for node in graph.graph.nodes if "autograd_function_apply" in str(node.target)]
        found[mode] = found.get(mode, 0) + len(calls)
        return graph.forward

    with (
        mock.patch.object(torch.utils._triton, "has_triton", lambda: True),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: card),
        FakeTensorMode(),
        torch.device("cuda"),
    ):
        model = ghost_batch_norm(gkl.models.create("wrn_10_1", num_classes=10), 4)
        x = torch.empty(8, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        for mode in ("train", "frozen", "eval"):
            torch._dynamo.reset()
            model.train(mode != "eval")
            with batch_norm.frozen_statistics(model) if mode == "frozen" else contextlib.nullcontext():
                torch.compile(model, backend=backend, fullgraph=True, dynamic=mode != "eval")(x)
    return found


# --- in the process of the tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    return in_a_process(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.long  # the interpreter goes through every case line by line
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_torch_s_in_float64(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    found, case = interpreted[name], COMMON | CASES[name]
    buffers = {"y", "running_mean", "running_var", "num_batches_tracked"}
    gradients = {f"to {wanted}" for wanted in ("x", "weight", "bias") if wanted[0] in case["wanted"]}
    assert found["ratios"].keys() == buffers | gradients
    assert max(found["ratios"].values()) <= 1.0, found["ratios"]
    assert found["dtype"] == f"torch.{case['dtype']}" and found["layout"] and found["same"]


@pytest.mark.long  # compiles for two GPUs
def test_kernels_compile_for_gpus_of_two_generations(tmp_path: Path) -> None:
    for sizes in in_a_process(__file__, "compile", TRITON_CACHE_DIR=str(tmp_path)).values():
        assert len(sizes) == 56 and min(sizes.values()) > 0


@pytest.mark.long  # compiles a network
def test_torch_compile_traces_a_network_whole_and_makes_its_own_kernels() -> None:
    assert in_a_process(__file__, "trace", CUDA_VISIBLE_DEVICES="") == {"train": 0, "frozen": 0, "eval": 0}


def grouped(device: str = "cuda", **options: Any) -> GhostBatchNorm2d:
    return ghost_batch_norm(nn.BatchNorm2d(16, device=device, **options), 2)


def test_the_kernels_take_what_they_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that only claim to lie on a GPU."""
    ampere, pascal = SimpleNamespace(major=8), SimpleNamespace(major=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: ampere)
    with FakeTensorMode():
        x = torch.empty(6, 16, 4, 4, device="cuda").to(memory_format=torch.channels_last)
        plain = grouped()
        assert batch_norm._fused(plain, x) and batch_norm._fused(plain, x.bfloat16())
        assert batch_norm._fused(plain, x[:, :, :1, :1].contiguous())
        assert not batch_norm._fused(plain, x.contiguous()) and not batch_norm._fused(plain, x.double())
        assert not batch_norm._fused(plain, x[:0]) and not batch_norm._fused(plain, x[0])
        assert not batch_norm._fused(plain, x[:3, :, :1, :1].contiguous())  # chunks of 2 and 1 values
        assert batch_norm._fused(grouped().eval(), x[:3, :, :1, :1].contiguous())
        assert not batch_norm._fused(plain, x.cpu()) and not batch_norm._fused(grouped("cpu"), x)
        assert not batch_norm._fused(grouped(momentum=None), x)
        assert batch_norm._fused(grouped(momentum=None).eval(), x)
        assert batch_norm._fused(grouped(track_running_stats=False).eval(), x)
        assert not batch_norm._fused(grouped(affine=False), x)
        assert not batch_norm._fused(grouped(dtype=torch.float16), x.half())
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: pascal)
        assert not batch_norm._fused(plain, x)


@pytest.mark.parametrize("split", [False, True])
def test_without_the_kernels_an_activation_is_torch_s_own(split: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    model = split_batch_norm(model) if split else model
    ghost_batch_norm(model, 2)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert activated(model[0], x, F.silu).equal(F.silu(model[0](x)))
    seen: list[Tensor] = []
    with model[0].register_forward_hook(lambda module, inputs, output: seen.append(output)):
        assert activated(model[0], x, F.relu).equal(F.relu(seen[0])) and (seen[0] < 0).any()


if __name__ == "__main__":
    answer(
        interpret=lambda: {name: errors(case) for name, case in CASES.items()},
        compile=lambda: of_each_capability(compiled_sizes),
        trace=traced_calls,
    )
