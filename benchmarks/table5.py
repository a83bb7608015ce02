"""Table V's last column: one training step on ImageNet's sizes of every method, all in one run, beside the paper's seconds.

    python benchmarks/table5.py [--device cuda] [--batch 512] [--rounds 3] [--seconds 60]
                                [--pairs resnet34_resnet18 resnet50_mobilenetv1]

A step: the teacher's forward, the student's forward and backward, the method, the update, on one fixed batch of 224x224 pictures
(nothing is read or decoded). Each method takes turns with GKL-KD. The paper: 4 RTX 3090, batch 512. Then GKL's own share of a ResNet-18
step at 1000 classes: of its time, and of what it keeps for the backward pass.
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from distillation import Untrained
from timing import Row, interleaved, ratios, report
from torch import Tensor

from gkl.data.batches import Batch
from gkl.data.files import ImageFiles, Split
from gkl.data.stores import Store
from gkl.losses.closed_form import gkl
from gkl.models import create
from trainers.runs.compose import compose
from trainers.runs.settings import build
from trainers.runs.targets import instantiate

METHODS = ("kd", "gkl", "ikl", "dkd", "at", "reviewkd", "ofd", "crd")
PAPER = {
    "resnet34_resnet18": {"reviewkd": 0.319, "ikl": 0.197, "gkl": 0.197},
    "resnet50_mobilenetv1": {"reviewkd": 0.526, "ikl": 0.252, "gkl": 0.252},
}


class Nowhere(Store):
    """Pictures that are never read."""

    names = ()


def pictures(count: int, side: int) -> ImageFiles:
    """As many as CRD needs to draw its negatives from, in 1000 classes."""
    from pathlib import Path

    part = Split(Nowhere(Path("nowhere")), np.array([b""] * count), torch.arange(count) % 1000)
    return ImageFiles("imagenet", tuple(map(str, range(1000))), part, part, side, side, "pillow")


def stepper(
    experiment: str, device: torch.device, batch: int, side: int, *overrides: str
) -> Callable[[], dict[str, Tensor]]:
    """A step of an experiment on ImageNet's sizes, always on the same pictures; its teacher, if it has one, is untrained."""
    config = compose("train", [f"experiment={experiment}", f"batch_size={batch}", "bn_groups=1", *overrides])
    data = pictures(20_000, side)
    given = {"data": data, "model": instantiate(config["model"], num_classes=1000), "device": device}
    if config.get("teacher"):
        given["teacher"] = Untrained(**vars(instantiate(config["teacher"])))
    task = build(config, **given)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, side, side, generator=generator).to(device)  # views already: nothing is drawn
    index = torch.arange(batch)  # on the CPU, where a batch's places are
    y, view, draws = (
        t.to(device) for t in (data.train_labels[index], torch.zeros_like(index), index.new_zeros(0, batch))
    )
    task.batches.batch = lambda epoch, step: Batch(x, draws, y, view, index)
    task.start_epoch(10)
    return lambda: task.train_step(10, 0)


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes that a computation keeps for its backward pass, each tensor once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


def share(device: torch.device, batch: int, side: int, rounds: int) -> list[Row]:
    """What GKL at 1000 classes is of a ResNet-18 step."""
    model = create("imagenet_resnet_18", 1000, "imagenet").to(device)
    x, y = torch.rand(batch, 3, side, side, device=device), torch.arange(batch, device=device) % 1000
    teacher = torch.randn(batch, 1000, device=device)
    logits = torch.randn(batch, 1000, device=device, requires_grad=True)
    weights = teacher.softmax(1)

    def network() -> Tensor:
        return torch.nn.functional.cross_entropy(model(x), y)

    def loss() -> Tensor:
        return gkl(logits, teacher, weights, alpha=1.0, beta=1.0, gamma=0.6, validate=False)

    times = interleaved(
        {"loss": lambda: loss().backward(), "step": lambda: network().backward()}, device, rounds
    )
    kept = 100 * kept_bytes(loss) / kept_bytes(network)
    return [
        Row(
            "GKL at 1000 classes, percent of a ResNet-18 step",
            [100 * r for r in ratios(times, "loss", "step")],
        ),
        Row("GKL at 1000 classes, percent of what it keeps for the backward pass", [kept]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--precision")
    parser.add_argument("--seconds", type=float, help="for each pair; on a GPU 60")
    parser.add_argument("--pairs", nargs="+", default=list(PAPER))
    arguments = parser.parse_args()
    device, side = torch.device(arguments.device), arguments.side
    batch = arguments.batch or (128 if device.type == "cuda" else 8)
    rounds = arguments.rounds or (10 if device.type == "cuda" else 3)
    # As the paper's code: PyTorch's convolutions are in TF32 unless it is told otherwise.
    precision = arguments.precision or ("tf32" if device.type == "cuda" else "float32")
    seconds = arguments.seconds or (60.0 if device.type == "cuda" else None)
    rows = []
    for pair in arguments.pairs:
        base = stepper(f"kd/in_gkl/{pair}", device, batch, side, f"precision={precision}")
        for method in METHODS:
            step = stepper(f"kd/in_{method}/{pair}", device, batch, side, f"precision={precision}")
            share = None if seconds is None else seconds / len(METHODS)
            times = interleaved({method: step, "base": base}, device, rounds, seconds=share)
            seconds, paper = statistics.median(times[method]), PAPER[pair]
            theirs = f"the paper's {paper[method] / paper['gkl']:.2f}" if method in paper else ""
            if device.type == "cuda":  # elsewhere a time says nothing
                theirs = (
                    f"{seconds:.3f} s; {theirs}, {paper.get(method, '')} s" if theirs else f"{seconds:.3f} s"
                )
            what = f"{pair}: {method} / gkl" + (f" ({theirs})" if theirs else "")
            more = {"seconds": round(seconds, 4), "paper_seconds": paper.get(method)}
            rows.append(Row(what, ratios(times, method, "base"), more=more))
            print(f"{what} done", flush=True)
            del step
    rows += share(device, batch, side, rounds)
    heading = (
        f"Table V: time ratios of one step on ImageNet's sizes, batch {batch}, {side}x{side}, {precision}; "
        "the paper's: 4 RTX 3090, batch 512"
    )
    report("table5", heading, rows, device)


if __name__ == "__main__":
    main()
