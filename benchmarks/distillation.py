"""One training step of each distillation method against plain KD's, interleaved in one run.

    python benchmarks/distillation.py [--device cuda] [--rounds 15] [--pair resnet32x4_resnet8x4]

A step: views, the teacher's forward, the student's forward and backward, the method, the update; CIFAR-100's sizes (batch 64,
32x32, 100 classes) on random pictures. Prints the median over rounds of time(method) / time(KD) with its quartiles; "kept
logits" is KD with the teacher's logits read back. KD itself stands among the methods to show the noise.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable

import torch
from timing import noise, timed

from gkl.data import ImageData
from trainers.configuration import build, compose, make
from trainers.distillation import Distillation
from trainers.teacher import Teacher

METHODS = ("kd", "gkl", "ikl", "dkd", "fitnet", "rkd", "ofd", "reviewkd", "crd")


class Untrained(Teacher):
    """The teacher's network as it is made: a step's time does not depend on its weights."""

    def load(self, num_classes: int) -> tuple[torch.nn.Module, dict[str, str]]:
        return self.network(num_classes=num_classes), {"sha256": "none"}


def stepper(
    method: str, pair: str, device: torch.device, data: ImageData, cache: str | None
) -> Callable[[], object]:
    config = compose("train", [f"experiment=kd/c100_{method}/{pair}"])
    teacher = make({**config["teacher"], "cache": cache})
    given = {"data": data, "model": make(config["model"], num_classes=100), "device": device}
    task: Distillation = build(config, **given, teacher=Untrained(**vars(teacher)))
    task.start_epoch(30)
    if cache:
        for step in range(task.steps_per_epoch):
            task.train_step(30, step)
        task.end_epoch(30)
        task.start_epoch(30)
    return lambda: task.train_step(30, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pair", default="resnet32x4_resnet8x4")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    data = noise()
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"torch {torch.__version__}, {name}, {arguments.pair}; time(step) / time(KD's step), median [quartiles]"
    )
    with tempfile.TemporaryDirectory() as folder:
        base = stepper("kd", arguments.pair, device, data, None)
        contestants = {m: stepper(m, arguments.pair, device, data, None) for m in METHODS}
        contestants["kd, kept logits"] = stepper("kd", arguments.pair, device, data, folder)
        for step in (base, *contestants.values()):
            timed(step, device)
        for name, step in contestants.items():
            ratios = []
            for number in range(arguments.rounds):
                order = (step, base) if number % 2 else (base, step)
                times = {call: timed(call, device) for call in order}
                ratios.append(times[step] / times[base])
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"  {name:16} {middle:.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
