"""What augmenting costs: our whole-batch views against a training step and against torchvision, in one run.

    python benchmarks/augmentation.py [--device cuda] [--rounds 20] [--model wrn_16_2]

First figure: time of the views of a batch of 128 over the time of one GKL-AT step on it (attack of 5 steps, AWP,
update) with the given network. Second: throughput of the views over torchvision's RandomCrop + RandomHorizontalFlip
(+ AutoAugment) applied picture by picture, as a data loader's worker does. Medians, turn by turn.
"""

import argparse
import statistics

import torch
from timing import noise, timed
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, Compose, RandomCrop, RandomHorizontalFlip

from gkl.augment import Views
from trainers.configuration import build, compose, make


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="wrn_16_2")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    data = noise()
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, batch 128 of 32x32, {arguments.model}"
    )
    for experiment in ("at/c100_basic_gkl", "at/c100_autoaug"):
        config = compose("train", [f"experiment={experiment}", f"model={arguments.model}"])
        model = make(config["model"], num_classes=100)
        task = build(config, data=data, model=model, device=device)
        task.start_epoch(20)
        views: Views = task.augment
        index = torch.arange(128, device=device)
        batch = task.training.images[index]
        each = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()])
        strong = Compose(
            [RandomCrop(32, padding=4), RandomHorizontalFlip(), AutoAugment(AutoAugmentPolicy.CIFAR10)]
        )
        made = [each, strong][: len(views.views)]

        def ours(views: Views = views, batch: torch.Tensor = batch, index: torch.Tensor = index) -> None:
            views(batch, seed=0, epoch=20, index=index)

        def torchvision(batch: torch.Tensor = batch, made: list[Compose] = made) -> None:
            for transform in made:
                torch.stack([transform(picture) for picture in batch])

        share, speed = [], []
        task.train_step(20, 0), ours(), torchvision()
        for _ in range(arguments.rounds):
            step, mine, theirs = (
                timed(f, device) for f in (lambda t=task: t.train_step(20, 0), ours, torchvision)
            )
            share.append(100 * mine / step)
            speed.append(theirs / mine)
        print(
            f"  {experiment:18} views {'+'.join(views.views)}: {statistics.median(share):.2f} % of a step, "
            f"{statistics.median(speed):.1f} x torchvision's throughput",
            flush=True,
        )


if __name__ == "__main__":
    main()
