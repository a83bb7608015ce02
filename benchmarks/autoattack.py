"""AutoAttack standard as the package comes against ours and against the screen, in turns, with every verdict compared.

    python benchmarks/autoattack.py [--device cuda] [--rounds 2] [--images 15] [--model wrn_10_1] [--share 1]

The network is one that this command first trains adversarially, a few epochs of TRADES at epsilon 0.1 on handwritten digits enlarged
to 32x32: a WRN-10-1, on a GPU a PreActResNet-18. It is attacked in the largest of RADII that a third of the images withstand PGD
in, so that some fall to each attack and many to none. Each round attacks the next `images` test images. An image that withstands
everything costs about 10,000 passes of the network, so that a round takes minutes; `share` of AutoAttack's iterations and queries, the
same for the package and for ours, on a GPU a fifth, where a pass of few images takes as long as one of many.
Where the target is missed, the operators shown are those of our screen: a profile of the whole attack does not fit in memory.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from timing import Arithmetic, Row, explained, ratios, report, timed, under
from torch import Tensor, nn

from gkl.data.digits import digits
from gkl.data.memory import ImageData
from gkl.evaluation import accuracy, evaluate, pgd_robust
from gkl.evaluation.autoattack import Version
from trainers.runs.compose import compose
from trainers.runs.settings import build
from trainers.runs.targets import instantiate

EPSILON = 0.1
RADII = (EPSILON, 0.07, 0.05, 0.03, 0.02, 0.01)
AT_LEAST = {"cpu": 1.3, "cuda": 2.0}
CHEAP = (
    "method.awp_gamma=0",
    "attack.phases=low",
    "attack.ramp=false",
    f"attack.epsilon={EPSILON}",
    "bn_groups=1",
)


def enlarged() -> ImageData:
    """The digits at 32x32, each pixel four wide."""
    data = digits()
    train, test = (F.interpolate(x, scale_factor=4) for x in (data.train_images, data.test_images))
    return ImageData("digits", 10, train, data.train_labels, test, data.test_labels, data.class_names)


def trained(data: ImageData, name: str, epochs: int, device: torch.device) -> nn.Module:
    """Robust on some images and not on others, in seconds."""
    config = compose(
        "train",
        [
            "experiment=at/c10_basic_kl",
            "scale=smoke",
            f"model={name}",
            f"epochs={epochs}",
            "batch_size=64",
            *CHEAP,
        ],
    )
    torch.manual_seed(0)
    model: nn.Module = instantiate(config["model"], num_classes=10)
    task = build(config, data=data, model=model, device=device)
    for epoch in range(1, epochs + 1):
        task.start_epoch(epoch)
        for step in range(task.steps_per_epoch):
            task.train_step(epoch, step)
    return model.to(device, memory_format=torch.contiguous_format).eval()


def radius(model: nn.Module, data: ImageData, device: torch.device) -> float:
    """The largest of RADII in which a third of the first test images withstand PGD; the smallest if none is."""
    few = data.test_images[:100], data.test_labels[:100]
    for epsilon in RADII:
        attack: dict[str, Any] = {
            "epsilon": epsilon,
            "steps": 10,
            "step_size": epsilon / 4,
            "batch_size": 100,
        }
        if pgd_robust(model, *few, device=device, **attack).double().mean() >= 1 / 3:
            break
    return epsilon


@contextmanager
def shortened(share: float) -> Iterator[None]:
    """Inside, the package's attacks are made with a share of their iterations and queries."""
    whole = AutoAttack.__init__

    def init(self: AutoAttack, *arguments: Any, **options: Any) -> None:
        whole(self, *arguments, **options)
        for apgd in (self.apgd, self.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = int(apgd.n_iter * share)
            apgd.n_iter_2 = max(int(0.22 * apgd.n_iter), 1)
            apgd.n_iter_min = max(int(0.06 * apgd.n_iter), 1)
            apgd.size_decr = max(int(0.03 * apgd.n_iter), 1)
        self.fab.n_iter = int(self.fab.n_iter * share)
        self.square.n_queries = int(self.square.n_queries * share)

    with mock.patch.object(AutoAttack, "__init__", whole if share == 1.0 else init):
        yield


def measured(
    model: nn.Module, data: ImageData, epsilon: float, device: torch.device, rounds: int, images: int
) -> tuple[list[Row], int]:
    """The rows, and how many verdicts differ from the package's."""

    def stock(x: Tensor, y: Tensor) -> Tensor:
        attack = AutoAttack(model, norm="Linf", eps=epsilon, seed=0, version="standard", device=device)
        _, predicted = attack.run_standard_evaluation(
            (x.float() / 255).to(device), y.to(device), batch_size=len(y)
        )
        return (predicted == y.to(device)).cpu()

    def ours(x: Tensor, y: Tensor, version: Version) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            result = evaluate(
                model, x, y, epsilon=epsilon, folder=Path(folder), device=device, version=version, batch_size=len(y)
            )  # fmt: skip
        return result.robust_flags

    variants = {
        "stock": stock,
        "ours": lambda x, y: ours(x, y, "standard"),
        "screen": lambda x, y: ours(x, y, "screen"),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    verdicts: dict[str, list[Tensor]] = {name: [] for name in variants}

    def attack(name: str, number: int) -> None:
        some = slice(number * images, (number + 1) * images)
        verdicts[name].append(variants[name](data.test_images[some], data.test_labels[some]))

    a_few = data.test_images[:2], data.test_labels[:2]
    ours(*a_few, "screen")  # whatever is done once
    if device.type == "cuda":
        model(torch.zeros(images, 3, 32, 32, device=device))  # and the choice of the kernels
    names = list(variants)
    for number in range(rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            # float32 as the package's users have it, whatever the training before has set; ours sets its own.
            times[name].append(timed(under(Arithmetic(False, False), partial(attack, name, number)), device))
            print(f"round {number + 1}, {name}: {times[name][-1]:.1f} s", flush=True)
    flags = {name: torch.cat(parts) for name, parts in verdicts.items()}
    equal, total, robust = (
        int((flags["ours"] == flags["stock"]).sum()),
        len(flags["ours"]),
        int(flags["ours"].sum()),
    )
    percent = {name: 100 * found.double().mean().item() for name, found in flags.items()}
    seconds = {f"{name}_seconds": [round(t, 2) for t in times[name]] for name in names}
    rows = [
        Row(
            "AutoAttack standard: stock / ours", ratios(times, "stock", "ours"), at_least=AT_LEAST[device.type],
            equal=f"verdicts equal: {equal} of {total}, {robust} of them robust", more=seconds,
        ),
        Row(
            "screen / AutoAttack standard, both ours", ratios(times, "screen", "ours"),
            equal=f"robust accuracy: screen {percent['screen']:.1f} %, AutoAttack {percent['ours']:.1f} %",
        ),
    ]  # fmt: skip
    rows[0] = explained(rows[0], partial(variants["screen"], *a_few), device)
    return rows, total - equal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int)
    parser.add_argument("--model")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--share", type=float)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_card = device.type == "cuda"
    name = arguments.model or ("preact_resnet_18" if on_card else "wrn_10_1")
    images, share = arguments.images or (128 if on_card else 15), arguments.share or (0.2 if on_card else 1.0)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    data = enlarged()
    model = trained(data, name, arguments.epochs or (6 if on_card else 3), device)
    epsilon = radius(model, data, device)
    right = accuracy(model, data.test_images, data.test_labels, batch_size=100, device=device)
    print(
        f"{name}: {100 * right.double().mean():.0f} % of the digits right, attacked at epsilon {epsilon:g}",
        flush=True,
    )
    with shortened(share):
        rows, different = measured(model, data, epsilon, device, arguments.rounds, images)
    part = "" if share == 1.0 else f", {100 * share:g} % of the iterations and queries"
    heading = (
        f"time ratios; {name}, digits at 32x32, epsilon {epsilon:g}, {images} images a round, float32{part}"
    )
    report("autoattack", heading, rows, device)
    if different:
        raise SystemExit(f"{different} verdicts differ from the stock package's")


if __name__ == "__main__":
    main()
