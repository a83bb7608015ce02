"""GKL forward and backward against PyTorch's own KL divergence, interleaved in one run.

    python benchmarks/loss.py [--device cuda] [--rounds 60]

Prints the median over rounds of time(GKL) / time(kl_div), with its quartiles, for each batch size and number of classes.
Baseline: F.kl_div(log_softmax(student), softmax(teacher)), forward and backward. "teacher fixed": gradient to the student
alone (distillation); "both": to both logits (adversarial training). Weights: class-wise rows of the prior (gather
included) or sample-wise. Both sides see the same logits and take turns within each round.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import timed
from torch import Tensor

from gkl.objectives import GKL
from gkl.prior import ClassPrior

SIZES = ((128, 100), (512, 1000), (2048, 1000), (64, 21841), (16384, 150))


def ratios(
    ours: Callable[[], None], base: Callable[[], None], rounds: int, device: torch.device
) -> list[float]:
    repeats = max(1, int(0.002 / timed(base, device)))

    def several(call: Callable[[], None]) -> Callable[[], None]:
        return lambda: [call() for _ in range(repeats)] and None

    for call in (ours, base):
        timed(several(call), device)
    found = []
    for number in range(rounds):
        first, second = (ours, base) if number % 2 else (base, ours)
        times = {first: timed(several(first), device), second: timed(several(second), device)}
        found.append(times[ours] / times[base])
    return found


def contestants(
    student: Tensor, teacher: Tensor, labels: Tensor, prior: ClassPrior, objective: GKL
) -> tuple[Callable[[], None], Callable[[], None]]:
    wanted = [x for x in (student, teacher) if x.requires_grad]

    def base() -> None:
        value = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")
        torch.autograd.grad(value, wanted)

    def ours() -> None:
        torch.autograd.grad(objective(student, teacher, labels, prior).mean(), wanted)

    return ours, base


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"torch {torch.__version__}, {name}; time(GKL) / time(kl_div), forward + backward, median [quartiles]"
    )
    for batch, classes in SIZES:
        torch.manual_seed(0)
        student = torch.randn(batch, classes, device=device, requires_grad=True)
        teacher = torch.randn(batch, classes, device=device, requires_grad=True)
        labels = torch.randint(classes, (batch,), device=device)
        many = classes > 5000  # a (C, C) prior would take 2 GB: sample-wise only
        prior = ClassPrior(2 if many else classes).to(device)
        line = f"{batch:6} x {classes:<6}"
        for weights in ("sample",) if many else ("class", "sample"):
            objective = GKL(alpha=20.0, beta=4.0, gamma=0.4, weights=weights)
            for scope, reference in (("both", teacher), ("teacher fixed", teacher.detach())):
                pair = contestants(student, reference, labels, prior, objective)
                low, middle, high = statistics.quantiles(ratios(*pair, arguments.rounds, device), n=4)
                line += f"  {weights}, {scope}: {middle:.2f} [{low:.2f}, {high:.2f}]"
        print(line, flush=True)


if __name__ == "__main__":
    main()
