"""What GKL costs on maps: its share of an APD step, and the memory that it takes beside the logits.

    python benchmarks/segmentation.py [--device cuda] [--side 473] [--rounds 3]

A step: two pictures of `side` x `side` on one card, PSPNet-R101 to PSPNet-R18, 150 classes, untrained, as a step's time depends on
neither; forward, backward and update, without reading pictures. The loss: GKL of the logits at full size, forward and backward to the
student. Memory: the peak of what a forward and backward of the divergence allocates, counted by torch's profiler on a CPU, in tensors of
the logits' size; in it is the gradient that both end in.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import Row, interleaved, ratios, report
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gkl.data.dense import DenseData, MemoryPages
from gkl.losses.dense import GKL, KL
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build
from trainers.runs.targets import instantiate

CLASSES, PICTURES = 150, 2


class Untrained:
    """The teacher as it is made."""

    cache = None

    def __init__(self, network: Callable[..., Any]) -> None:
        self.network = network

    def load(self, num_classes: int) -> tuple[Any, dict[str, Any]]:
        return self.network(num_classes=num_classes), {"sha256": "none"}


def made(device: torch.device, side: int, *overrides: str) -> Training:
    """A training of APD with GKL on pictures of noise, one card's two unless told, which every step takes."""
    words = ["experiment=seg/apd_gkl", f"batch_size={PICTURES}", "bn_groups=1", "workers=0", *overrides]
    config = compose("train", words)
    generator = torch.Generator().manual_seed(0)
    count = config["batch_size"]
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)
    labels = torch.randint(0, CLASSES, (count, side, side), generator=generator).to(torch.uint8)
    pages = MemoryPages(images, labels)
    data = DenseData("noise", tuple(map(str, range(CLASSES))), pages, pages, side, side)
    torch.manual_seed(0)
    teacher = Untrained(instantiate(config["teacher"]["network"]))
    task = build({**config, "initial": None}, device=device, data=data, teacher=teacher)
    task.start_epoch(1)
    batch = task.batch(1, 0)
    task.batch = lambda epoch, step: batch  # type: ignore[method-assign]
    return task


def logits(device: torch.device, side: int) -> tuple[Tensor, Tensor]:
    """The student's (2, 150, side, side), with gradient, and the teacher's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (3 * torch.randn(PICTURES, CLASSES, side, side, generator=generator)).to(device) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def peak_tensors(call: Callable[[], object], size: int) -> float:
    """The most that a call on the CPU holds at once beyond what was there, in units of `size` bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = most = 0
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / size


def rows_of(device: torch.device, side: int, rounds: int, *overrides: str) -> list[Row]:
    """GKL's share of a step, and the memory of both divergences."""
    task = made(device, side, *overrides)
    inputs = task.method.inputs(task.batch(1, 0), 1, 0)
    task.samples, task.first_step = PICTURES, False
    student, teacher = logits(device, side)
    terms = {"GKL": GKL(), "KL": KL()}

    def backward(name: str) -> None:
        student.grad = None
        terms[name](student, teacher).mean().backward()

    variants: dict[str, Callable[[], object]] = {name: (lambda n=name: backward(n)) for name in terms}
    variants["step"] = lambda: task.method.update(*inputs)
    times = interleaved(variants, device, rounds)
    size = f"{PICTURES}x{CLASSES}x{side}x{side}"
    rows = [
        Row(
            f"{name}, percent of an APD step, {size}",
            [100 * r for r in ratios(times, name, "step")],
            at_most=bound,
        )
        for name, bound in (("GKL", 5.0), ("KL", None))
    ]
    student, teacher = (x.detach().cpu() for x in (student, teacher))
    student.requires_grad_()
    for name, bound in (("GKL", 4.5), ("KL", None)):
        student.grad = None  # what a call ends in counts, and not what it finds
        peak = peak_tensors(lambda n=name: backward(n), student.numel() * 4)
        rows.append(Row(f"{name}, memory in tensors of the logits, {size}, on a CPU", [peak], at_most=bound))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, default=473)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = rows_of(device, arguments.side, arguments.rounds)
    report(
        "segmentation",
        f"GKL on maps: a step of Table XXIII, pictures of {arguments.side}x{arguments.side}",
        rows,
        device,
    )


if __name__ == "__main__":
    main()
