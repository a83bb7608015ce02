"""Batch norm and ReLU in one pass against torch's own, forward and backward, in turns; on a GPU alone.

    python benchmarks/batch_norm.py [--device cuda] [--rounds 15]

Ratios are time(torch) / time(ours) at the sizes of the adversarial training's networks, batch 128, bfloat16, channels_last. "train":
statistics of the batch, in one group and in four, gradients to map and parameters; torch's four are four calls and a copy, as
without the kernels. "attack": running statistics, the gradient to the map alone. What is timed is recorded as a CUDA graph, as a step is,
over several maps in turn, so that none is found in the cache. GB/s: the fewest bytes that there are to move (train 8 passes over the
map: forward 2 reads and a write, backward 4 reads and a write; attack 5) over our time.
"""

import argparse
import copy
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from timing import Row, interleaved, ratios, report
from torch import Tensor, nn

from gkl.models import batch_norm
from gkl.models.batch_norm import GhostBatchNorm2d, activated, ghost_batch_norm

SHAPES = {
    "wrn_34_10": [(160, 32), (320, 16), (640, 8)],
    "preact_resnet_18": [(64, 32), (128, 16), (256, 8), (512, 4)],
}  # channels, side
BATCH = 128
MAPS = 200_000_000  # bytes of maps that a recording goes through, four times what an H100's cache holds
CALLS = 8  # at least, in a recording


class Case:
    """One size and mode, and the calls that are timed."""

    def __init__(self, channels: int, side: int, groups: int, attack: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.norm = ghost_batch_norm(nn.BatchNorm2d(channels, device=device), groups)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias, std=0.3)
        self.norm.train(not attack).requires_grad_(not attack)
        shape = (BATCH, channels, side, side)
        self.bytes = 2 * BATCH * channels * side * side
        self.passes = 5 if attack else 8
        count = min(CALLS, -(-MAPS // (2 * self.bytes)))
        self.maps, self.slopes = (
            [
                torch.randn(shape, device=device)
                .bfloat16()
                .contiguous(memory_format=torch.channels_last)
                .requires_grad_(wanted)
                for _ in range(count)
            ]
            for wanted in (True, False)
        )

    def once(self, number: int, norm: GhostBatchNorm2d) -> tuple[Tensor, ...]:
        """Output and gradients."""
        x, slope = (tensors[number % len(tensors)] for tensors in (self.maps, self.slopes))
        y = activated(norm, x, F.relu)
        wanted = [x, *(p for p in norm.parameters() if p.requires_grad)]
        return y.detach(), *torch.autograd.grad(y, wanted, slope)

    def calls(self) -> None:
        for number in range(CALLS):
            self.once(number, self.norm)

    def torch_s(self) -> None:
        with mock.patch.object(batch_norm, "HAS_TRITON", False):
            self.calls()

    def difference(self) -> str:
        """Of ours from torch's in float64, and torch's in bfloat16 from it, relative to the largest entry."""
        exact = copy.deepcopy(self.norm).double()
        x, slope = self.maps[0].detach().double().requires_grad_(), self.slopes[0].double()
        y = F.relu(exact(x))
        wanted = [x, *(p for p in exact.parameters() if p.requires_grad)]
        truth = (y.detach(), *torch.autograd.grad(y, wanted, slope))
        mine = self.once(0, copy.deepcopy(self.norm))
        with mock.patch.object(batch_norm, "HAS_TRITON", False):
            theirs = self.once(0, copy.deepcopy(self.norm))
        found = [
            max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, truth, strict=True))
            for values in (mine, theirs)
        ]
        return f"from float64: ours {found[0]:.0e}, torch {found[1]:.0e}"


def recorded(call: Callable[[], None]) -> Callable[[], object]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measured(device: torch.device, rounds: int) -> list[Row]:
    rows = []
    for network, sizes in SHAPES.items():
        for channels, side in sizes:
            for name, groups, attack in (
                ("train, 4 groups", 4, False),
                ("train", 1, False),
                ("attack", 1, True),
            ):
                case = Case(channels, side, groups, attack, device)
                equal = case.difference()
                variants = {"ours": recorded(case.calls), "torch": recorded(case.torch_s)}
                times = interleaved(variants, device, rounds)
                seconds = sorted(times["ours"])[len(times["ours"]) // 2] / CALLS
                more = {
                    "microseconds": round(seconds * 1e6, 1),
                    "gigabytes_per_second": round(case.passes * case.bytes / seconds / 1e9),
                }
                what = f"{network}, {channels} x {side} x {side}, {name}"
                print(f"{what}: {more['microseconds']} µs, {more['gigabytes_per_second']} GB/s", flush=True)
                rows.append(Row(what, ratios(times, "torch", "ours"), at_least=1.0, equal=equal, more=more))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise SystemExit(
            "error: elsewhere than on a GPU batch norm is torch's own; there is nothing to compare"
        )
    heading = "batch norm and ReLU, forward and backward: time(torch) / time(ours), bfloat16, batch 128"
    report("batch_norm", heading, measured(device, arguments.rounds), device)


if __name__ == "__main__":
    main()
