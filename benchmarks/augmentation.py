"""What augmenting costs: our whole-batch views against torchvision's picture by picture, and beside a training step, in one run.

    python benchmarks/augmentation.py [--device cuda] [--rounds 9] [--model wrn_16_2]

A batch of pictures of 32x32. Throughput: ours over torchvision's RandomCrop + RandomHorizontalFlip (+ AutoAugment), one picture after
the other on the CPU as a data loader's worker has it. Share: time of the views in percent of one GKL-AT step on the batch (attack of 5 steps, AWP,
update) of the given network.
"""

import argparse

import torch
from timing import Row, explained, interleaved, noise, ratios, report
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, Compose, RandomCrop, RandomHorizontalFlip

from trainers.runs.compose import compose
from trainers.runs.settings import build
from trainers.runs.targets import instantiate

AT_LEAST = {"crop_flip": 5.0}  # the throughput that is wanted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", default="wrn_16_2")
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    data, rows = noise(), []
    each = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()])
    strong = Compose(
        [RandomCrop(32, padding=4), RandomHorizontalFlip(), AutoAugment(AutoAugmentPolicy.CIFAR10)]
    )
    for experiment, made in (("at/c100_basic_gkl", [each]), ("at/c100_autoaug", [each, strong])):
        config = compose(
            "train", [f"experiment={experiment}", f"model={arguments.model}", f"batch_size={arguments.batch}"]
        )
        task = build(config, data=data, model=instantiate(config["model"], num_classes=100), device=device)
        task.start_epoch(20)
        index = torch.arange(arguments.batch)  # on the CPU, where a batch's places are
        batch = task.batches.images[index.to(device)]
        pictures = batch.cpu()
        variants = {
            "ours": lambda augment=task.batches.augment, index=index, batch=batch: augment(
                batch, seed=0, epoch=20, index=index
            ),
            "torchvision": lambda batch=pictures, made=made: [
                torch.stack([f(x) for x in batch]) for f in made
            ],
            "step": lambda task=task: task.train_step(20, 0),
        }
        times, name = interleaved(variants, device, arguments.rounds), " + ".join(task.batches.augment.views)
        row = Row(f"{name}: throughput", ratios(times, "torchvision", "ours"), at_least=AT_LEAST.get(name))
        rows.append(explained(row, variants["ours"], device))
        share = [100 * ratio for ratio in ratios(times, "ours", "step")]
        rows.append(Row(f"{name}: percent of a step of {arguments.model}", share))
    report(
        "augmentation", "our views against torchvision's picture by picture, and against a step", rows, device
    )


if __name__ == "__main__":
    main()
