"""Batch norm's Triton kernels on a GPU, at the sizes of the networks: against float64, compiled, recorded, in whole networks."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gkl.models
from gkl.models import batch_norm
from gkl.models.batch_norm import (
    activated,
    eval_mode,
    frozen_parameters,
    frozen_statistics,
    ghost_batch_norm,
)
from gkl.models.folding import folded
from tests.gkl.models.test_triton_batch_norm import BOUND, CASES, COMMON, made, results

pytestmark = pytest.mark.gpu

LARGE: dict[str, dict[str, Any]] = {
    "wrn_34_10, first stage": {"shape": (128, 160, 32, 32)},
    "wrn_34_10, second stage": {"shape": (128, 320, 16, 16)},
    "wrn_34_10, third stage": {"shape": (128, 640, 8, 8)},
    "wrn_34_10, stem": {"shape": (128, 16, 32, 32)},
    "wrn_34_20, third stage": {"shape": (128, 1280, 8, 8)},
    "preact_resnet_18, first stage": {"shape": (128, 64, 32, 32)},
    "preact_resnet_18, last stage": {"shape": (128, 512, 4, 4)},
    "wrn_28_10_swish, second stage": {"shape": (256, 320, 16, 16), "activation": "silu"},
    "the last batch": {"shape": (80, 160, 32, 32)},
    "a ragged batch": {"shape": (50, 64, 32, 32)},
    "one group": {"shape": (128, 64, 32, 32), "groups": 1},
    "float32": {"shape": (128, 160, 32, 32), "dtype": "float32"},
    "float16": {"shape": (128, 160, 32, 32), "dtype": "float16"},
}


def compared(mine: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert mine.keys() == exact.keys()
    for name, value in mine.items():
        wanted = exact[name].double()
        rounding = 0.0 if value.dtype in (torch.float32, torch.int64) else torch.finfo(value.dtype).eps / 2
        # 2 BOUND where the interpreter has one: the gradients to parameters are sums over up to 131072 values.
        allowed = 2 * BOUND * wanted.abs().max().item() + (6e-8 if value.dtype == torch.float16 else 0.0)
        torch.testing.assert_close(
            value.double(), wanted, rtol=rounding, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
        )


SMALL = [name for name in CASES if " groups, " not in name]  # each new kind of call compiles its kernels
SMALL += ["train, 4 groups, silu", "frozen, 4 groups, none", "eval, 1 groups, relu"]


@pytest.mark.parametrize("name", SMALL)
def test_kernels_are_torch_s_in_float64(name: str) -> None:
    case = COMMON | CASES[name]
    norm, x, slope = made(case, "cuda")
    assert batch_norm._fused(norm, x)
    exact = results(copy.deepcopy(norm).double(), x.double(), slope.double(), case)
    again = copy.deepcopy(norm)
    mine = results(norm, x, slope, case)
    compared(mine, exact)
    assert mine["y"].stride() == x.stride() and mine["y"].dtype == x.dtype
    assert all(value.equal(mine[at]) for at, value in results(again, x, slope, case).items())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LARGE)
def test_they_are_at_the_sizes_of_the_networks(name: str, mode: str) -> None:
    case = COMMON | {"groups": 4, "mode": mode, "dtype": "bfloat16"} | LARGE[name]
    norm, x, slope = made(case, "cuda")
    assert batch_norm._fused(norm, x)
    before = results(copy.deepcopy(norm).double(), x.double(), slope.double(), case | {"activation": "none"})[
        "y"
    ]
    slope[before.abs() < 1e-4] = 0.0  # of ten million values one may fall on the other side of ReLU's kink
    exact = results(copy.deepcopy(norm).double(), x.double(), slope.double(), case)
    compared(results(norm, x, slope, case), exact)


def test_float32_is_closer_to_float64_than_torch_s_own() -> None:
    case = COMMON | {"shape": (128, 160, 32, 32), "offset": 100.0, "activation": "none"}
    norm, x, slope = made(case, "cuda")
    exact = results(copy.deepcopy(norm).double(), x.double(), slope.double(), case)["y"]
    mine = results(copy.deepcopy(norm), x, slope, case)["y"]
    with mock.patch.object(batch_norm, "HAS_TRITON", False):
        theirs = results(norm, x, slope, case)["y"]
    assert (mine.double() - exact).abs().max() <= (theirs.double() - exact).abs().max()


def test_a_map_that_is_not_a_number_stays_none() -> None:
    norm, x, _ = made(COMMON | {"groups": 2}, "cuda")
    x[0, 3, 1, 1] = float("nan")
    assert norm(x, F.relu)[:3, 3].isnan().all()
    assert norm.running_mean[3].isnan() and norm.running_mean.isnan().sum() == 1


@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_traced_whole(mode: str, dtype: torch.dtype) -> None:
    case = COMMON | {"shape": (8, 32, 8, 8), "groups": 4, "mode": mode, "dtype": str(dtype).split(".")[1]}
    norm, x, slope = made(case, "cuda")
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        module, images = copy.deepcopy(norm), x.clone().requires_grad_()

        def forward(images: Tensor, module: Any = module) -> Tensor:
            return activated(module, images, F.relu)

        y = (torch.compile(forward, fullgraph=True) if compiled else forward)(images)
        y.backward(slope)
        gradients = [images.grad, module.weight.grad, module.bias.grad]
        found.append([y.detach(), *gradients, *(b.clone() for b in module.buffers())])
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for plain, traced in zip(*found, strict=True):  # torch.compile makes kernels of its own
        torch.testing.assert_close(traced, plain, **close)


def small(name: str) -> nn.Module:
    """A network in groups of 4 whose batch norms are not the identity."""
    torch.manual_seed(0)
    model = ghost_batch_norm(gkl.models.create(name, num_classes=10), 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


NETWORKS = ("preact_resnet_18", "wrn_16_2", "wrn_16_2_swish")


def passes(model: nn.Module, x: Tensor) -> list[Tensor]:
    """An attack's gradient, a step of frozen statistics and one that renews them; then all that has changed."""
    found = []
    with eval_mode(model), frozen_parameters(model):
        found.append(torch.autograd.grad(model(x).square().sum(), x)[0])
    with frozen_statistics(model):
        found += torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    found += torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    return [*found, *(b.detach().clone() for b in model.buffers())]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_the_cpu_s_in_float64(name: str) -> None:
    model = small(name)
    x = torch.rand(18, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    exact = passes(copy.deepcopy(model).double(), x.double().requires_grad_())
    model = model.cuda().to(memory_format=torch.channels_last)
    images = x.cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
    answers, fused = [], batch_norm._fused
    noted = mock.patch.object(batch_norm, "_fused", lambda *args: answers.append(fused(*args)) or answers[-1])
    with noted, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        mine = passes(model, images)
    assert len(answers) >= 3 * 13 and all(answers)
    buffers = len(list(model.buffers()))
    for number, (value, wanted) in enumerate(zip(mine, exact, strict=True)):
        away = (value.cpu().double() - wanted).norm() / wanted.double().norm().clamp(min=1e-12)
        # Of a gradient through a ReLU now and then an entry falls on the other side of the kink.
        allowed = 1e-5 if number >= len(mine) - buffers else 1e-4 if "swish" in name else 5e-3
        assert away < allowed, (number, tuple(wanted.shape), away)


def test_taps_and_folding_are_as_before() -> None:
    model = gkl.models.create("wrn_16_2", num_classes=10).cuda().to(memory_format=torch.channels_last)
    grouped = ghost_batch_norm(copy.deepcopy(model), 4).eval()
    model.eval()
    x = torch.rand(6, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        mine, theirs = grouped.forward_taps(x), model.forward_taps(x)
        for ours, plain in zip(
            [*mine.features, *mine.preact_features], [*theirs.features, *theirs.preact_features], strict=True
        ):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grouped(x), mine.logits, rtol=1e-4, atol=1e-5)
        lean = [folded(network, x[:2]) for network in (grouped, model)]
        torch.testing.assert_close(lean[0](x), grouped(x), rtol=1e-3, atol=1e-4)
    left = [sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) for network in lean]
    assert left == [6, 6]


def test_a_recorded_step_has_the_bits_of_one_that_is_not() -> None:
    model = small("wrn_16_2").cuda().to(memory_format=torch.channels_last)
    batches = [torch.rand(16, 3, 32, 32, device="cuda") for _ in range(4)]
    batches = [x.contiguous(memory_format=torch.channels_last) for x in batches]

    def step(network: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return passes(network, x.detach().requires_grad_())

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        plain, recorded = copy.deepcopy(model), copy.deepcopy(model)
        wanted = [[v.clone() for v in step(plain, x)] for x in batches]
        static = batches[0].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(recorded, static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(recorded, static)
        recorded.load_state_dict(model.state_dict())
        for x, values in zip(batches, wanted, strict=True):
            static.copy_(x)
            graph.replay()
            assert all(a.equal(b) for a, b in zip(found, values, strict=True))


def test_memory_is_that_of_what_comes_out() -> None:
    """Backward keeps the map itself: relu's mask is not stored."""
    case = COMMON | {"shape": (128, 160, 32, 32), "groups": 4, "dtype": "bfloat16"}
    norm, x, slope = made(case, "cuda")
    wanted = [x.requires_grad_(), norm.weight, norm.bias]
    torch.autograd.grad(norm(x, F.relu), wanted, slope)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = norm(x, F.relu)
    assert torch.cuda.memory_allocated() - before < 1.05 * x.numel() * x.element_size()
    torch.autograd.grad(y, wanted, slope)
    assert torch.cuda.max_memory_allocated() - before < 2.05 * x.numel() * x.element_size()
