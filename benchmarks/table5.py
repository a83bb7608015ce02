"""Table V's last column: one training step on ImageNet's sizes of every method, all in one run, beside the paper's seconds.

    python benchmarks/table5.py [--device cuda] [--batch 512] [--rounds 10] [--pairs resnet34_resnet18 resnet50_mobilenetv1]

A step: the teacher's forward, the student's forward and backward, the method, the update, on one fixed batch of 224x224 pictures
(nothing is read or decoded). Prints each method's median seconds, and the median over rounds of time(method) / time(KD) with its
quartiles. The paper: 4 RTX 3090, batch 512. Then GKL's own share of a ResNet-18 step at 1000 classes: of its time, and of what it
keeps for the backward pass.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from distillation import Untrained
from timing import timed
from torch import Tensor

from gkl.imagenet import ImageFiles, Split
from gkl.losses import gkl
from gkl.models import create
from gkl.pictures import Store
from trainers.configuration import build, compose, make

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
    method: str, pair: str, device: torch.device, batch: int, side: int, precision: str
) -> Callable[[], object]:
    config = compose(
        "train",
        [f"experiment=kd/in_{method}/{pair}", f"batch_size={batch}", "bn_groups=1", f"precision={precision}"],
    )
    data = pictures(20_000, side)
    teacher = Untrained(**{**vars(make(config["teacher"]))})
    task = build(
        config, data=data, model=make(config["model"], num_classes=1000), device=device, teacher=teacher
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, side, side, generator=generator).to(device)
    index = torch.arange(batch, device=device)
    y = data.train_labels.to(device)[index]
    task.batch = lambda epoch, step: (x, y, torch.zeros_like(index), index)
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


def share(device: torch.device, batch: int, side: int, rounds: int) -> None:
    """What GKL at 1000 classes is of a ResNet-18 step."""
    model = create("imagenet_resnet_18", 1000, "imagenet").to(device)
    x, y = torch.rand(batch, 3, side, side, device=device), torch.arange(batch, device=device) % 1000
    teacher = torch.randn(batch, 1000, device=device)
    logits = torch.randn(batch, 1000, device=device, requires_grad=True)
    weights = teacher.softmax(1)

    def step() -> Tensor:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def loss() -> Tensor:
        value = gkl(logits, teacher, weights, alpha=1.0, beta=1.0, gamma=0.6, validate=False)
        value.backward()
        return value

    for call in (step, loss):
        timed(call, device)
    ratios = [timed(loss, device) / timed(step, device) for _ in range(rounds)]
    low, middle, high = (100 * q for q in statistics.quantiles(ratios, n=4))
    parts = [
        kept_bytes(lambda: gkl(logits, teacher, weights, alpha=1.0, beta=1.0, gamma=0.6, validate=False)),
        kept_bytes(lambda: torch.nn.functional.cross_entropy(model(x), y)),
    ]
    print(
        f"GKL at 1000 classes in a ResNet-18 step (batch {batch}): {middle:.2f} % [{low:.2f}, {high:.2f}] of the time, "
        f"{100 * parts[0] / parts[1]:.2f} % of what is kept for the backward pass"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--pairs", nargs="+", default=list(PAPER))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    batch = arguments.batch or (128 if device.type == "cuda" else 8)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"torch {torch.__version__}, {name}, batch {batch}, {arguments.side}x{arguments.side}, {arguments.precision}"
    )
    for pair in arguments.pairs:
        print(
            f"{pair}: seconds; time / KD's, median [quartiles]; the paper's seconds (4 RTX 3090, batch 512)"
        )
        make_step = partial(
            stepper, pair=pair, device=device, batch=batch, side=arguments.side, precision=arguments.precision
        )
        base = make_step("kd")
        timed(base, device)
        for method in METHODS:
            step = make_step(method)
            timed(step, device)
            seconds, ratios = [], []
            for number in range(arguments.rounds):
                order = (step, base) if number % 2 else (base, step)
                times = {call: timed(call, device) for call in order}
                seconds.append(times[step])
                ratios.append(times[step] / times[base])
            low, middle, high = statistics.quantiles(ratios, n=4)
            paper = PAPER[pair].get(method)
            print(
                f"  {method:9} {statistics.median(seconds):7.3f} s  {middle:.3f} [{low:.3f}, {high:.3f}]  "
                f"paper: {f'{paper:.3f} s' if paper else 'not given'}",
                flush=True,
            )
            del step
    share(device, batch, arguments.side, arguments.rounds)


if __name__ == "__main__":
    main()
