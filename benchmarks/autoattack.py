"""AutoAttack standard as the package comes against ours and against the screen, in turns, with every verdict compared.

    python benchmarks/autoattack.py [--device cuda] [--rounds 2] [--images 15]

The network is a WRN-10-1 that this command first trains adversarially, a few epochs of TRADES at epsilon 0.1 on handwritten
digits enlarged to 32x32, so that some images fall to each attack and many to none. Each round attacks the next `images` test
images. An image that withstands everything costs about 10,000 passes of the network, so that a round takes minutes.
Where the target is missed, the operators shown are those of our screen: a profile of the whole attack does not fit in memory.
"""

import argparse
import logging
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from timing import Row, explained, ratios, report, timed
from torch import Tensor, nn

from gkl.data import ImageData, digits
from gkl.evaluation import evaluate
from gkl.evaluation.autoattack import Version
from trainers.configuration import build, compose, make

EPSILON = 0.1
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


def trained(data: ImageData, device: torch.device) -> nn.Module:
    """Robust on some images and not on others, in seconds."""
    config = compose(
        "train", ["experiment=at/c10_basic_kl", "scale=smoke", "epochs=3", "batch_size=64", *CHEAP]
    )
    torch.manual_seed(0)
    model = make(config["model"], num_classes=10)
    task = build(config, data=data, model=model, device=device)
    for epoch in range(1, config["epochs"] + 1):
        task.start_epoch(epoch)
        for step in range(task.steps_per_epoch):
            task.train_step(epoch, step)
    return model.to(device, memory_format=torch.contiguous_format).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    data = enlarged()
    model = trained(data, device)

    def stock(x: Tensor, y: Tensor) -> Tensor:
        attack = AutoAttack(model, norm="Linf", eps=EPSILON, seed=0, version="standard", device=device)
        _, predicted = attack.run_standard_evaluation(
            (x.float() / 255).to(device), y.to(device), batch_size=len(y)
        )
        return (predicted == y.to(device)).cpu()

    def ours(x: Tensor, y: Tensor, version: Version) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            result = evaluate(
                model, x, y, epsilon=EPSILON, folder=Path(folder), device=device, version=version, batch_size=len(y)
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
        some = slice(number * arguments.images, (number + 1) * arguments.images)
        verdicts[name].append(variants[name](data.test_images[some], data.test_labels[some]))

    a_few = data.test_images[:2], data.test_labels[:2]
    ours(*a_few, "screen")  # whatever is done once
    names = list(variants)
    for number in range(arguments.rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            times[name].append(timed(partial(attack, name, number), device))
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
            "AutoAttack standard: stock / ours", ratios(times, "stock", "ours"), at_least=1.3,
            equal=f"verdicts equal: {equal} of {total}, {robust} of them robust", more=seconds,
        ),
        Row(
            "screen / AutoAttack standard, both ours", ratios(times, "screen", "ours"),
            equal=f"robust accuracy: screen {percent['screen']:.1f} %, AutoAttack {percent['ours']:.1f} %",
        ),
    ]  # fmt: skip
    rows[0] = explained(rows[0], partial(variants["screen"], *a_few), device)
    heading = f"time ratios; WRN-10-1, digits at 32x32, epsilon {EPSILON}, {arguments.images} images a round, float32"
    report("autoattack", heading, rows, device)
    if equal < total:
        raise SystemExit(f"{total - equal} verdicts differ from the stock package's")


if __name__ == "__main__":
    main()
