"""A semi-supervised step against a supervised one of the same network: no more than the forward passes it makes.

    python benchmarks/semi_supervised.py [--device cuda] [--model vit_small_patch2_32] [--rounds 5]

A supervised step on 8 labelled pictures is 3 forward-equivalents a picture; FixMatch's, with a weak and a strong view of as many
without a label, 9; Mean-Teacher's, whose target costs a forward alone, 7 (`forwards` of the methods). Views, update and average
included. The target: time(semi-supervised) / time(supervised) at most 1.1 times the ratio of these.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import Row, explained, interleaved, noise, ratios, report

from gkl.data.augment import to_float
from gkl.data.few_labels import FewLabels
from gkl.models import create
from gkl.models.timm_network import set_sample_keys
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build

METHODS = {"FixMatch + GKL": "fixmatch_gkl", "Mean-Teacher + GKL": "mean_teacher_gkl"}
OVER = 1.1  # times the share of the forward passes


def made(experiment: str, model: str, device: torch.device, *own: str) -> Training:
    """A training of an experiment on random pictures of CIFAR-100's shape, 200 of them labelled."""
    words = [f"experiment=ssl/{experiment}", "schedule.warmup=0", *own]
    config = {**compose("train", words), "initial": None}
    data = FewLabels(**vars(noise()), labelled=torch.arange(200), steps_per_epoch=8, unlabelled=1)
    task = build(config, data=data, model=create(model, 100, "cifar100_usb"), device=device)
    task.start_epoch(1)
    return task


def supervised(task: Training) -> Callable[[], None]:
    """A step on the labelled pictures of the same training alone."""

    def step() -> None:
        batch = task.batch(1, 0)
        task.model.train()
        set_sample_keys(task.model, batch.keys[: len(batch.labelled)])
        logits = task.method.logits(to_float(batch.labelled).to(task.compute.dtype))
        task.optimizer_step(F.cross_entropy(logits, batch.labels))
        task.after_step()

    return step


def measured(model: str, device: torch.device, rounds: int) -> list[Row]:
    """A row for each method."""
    rows = []
    for name, experiment in METHODS.items():
        task = made(experiment, model, device)
        count = type(task.method).forwards({"data": {"unlabelled": 1}}, 1, 0)["model"]
        call = {"semi": lambda task=task: task.train_step(1, 0), "supervised": supervised(task)}
        found = ratios(interleaved(call, device, rounds), "semi", "supervised")
        row = Row(f"{name}, {model}: step / supervised step", found, at_most=round(OVER * count / 3, 3))
        rows.append(explained(row, call["semi"], device))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="vit_small_patch2_32")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = torch.device(given.device)
    heading = "A semi-supervised step's time over a supervised step's, 8 labelled pictures each"
    report("semi_supervised", heading, measured(given.model, device, given.rounds), device)


if __name__ == "__main__":
    main()
