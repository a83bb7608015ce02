"""One distillation step against the published one, and each method's against plain KD's, in turns.

    python benchmarks/distillation.py [--device cuda] [--rounds 3] [--method-rounds 1] [--processes 3] [--pair resnet32x4_resnet8x4]
                                      [--seconds 12]

A step: views, the teacher's forward, the student's forward and backward, the method, the update; CIFAR-100's sizes (batch 64,
32x32, 100 classes) on random pictures and with an untrained teacher, as a step's time depends on neither. The published step is
GKL-KD as the authors' loop has it, written out below: the teacher under no_grad, contiguous tensors, the loss over all pairs of
classes. Ours: channels_last, the teacher in inference mode; "kept logits": read from teacher.cache, which a first pass has filled.
Beside each stands the largest difference of a parameter after two steps in float64. On a GPU the published step has the switches
that its scripts leave (TF32 in convolutions), ours TF32 or bfloat16, step by step and, with `graph`, replayed as CUDA graphs.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import (
    AS_PUBLISHED,
    Row,
    arithmetic,
    explained,
    interleaved,
    noise,
    ratios,
    recorded,
    report,
    spread,
    under,
)

from gkl.data.memory import ImageData
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build
from trainers.runs.targets import instantiate
from trainers.runs.teacher import Teacher

METHODS = ("kd", "gkl", "ikl", "dkd", "fitnet", "rkd", "ofd", "reviewkd", "crd")
EPOCH = 30  # after the warm-up of the methods that have one
OURS = "channels_last=true"


class Untrained(Teacher):
    """The teacher's network as it is made, its running statistics those of the pictures."""

    def load(self, num_classes: int) -> tuple[torch.nn.Module, dict[str, str]]:
        network = self.network(num_classes=num_classes)
        norms = [norm for norm in network.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # what one batch has
        if norms:
            with torch.no_grad():
                network.train()(noise().train_images[:64].float() / 255)
        return network.eval(), {"sha256": "none"}


def made(
    method: str, pair: str, device: torch.device, data: ImageData, *overrides: str, cache: str | None = None
) -> Training:
    """A training of the pair, always from the same weights; with a cache, its views of the first epoch are in it."""
    config = compose("train", [f"experiment=kd/c100_{method}/{pair}", *overrides])
    teacher = instantiate({**config["teacher"], "cache": cache})
    torch.manual_seed(0)
    given = {"data": data, "model": instantiate(config["model"], num_classes=100), "device": device}
    task = build(config, **given, teacher=Untrained(**vars(teacher)))
    task.start_epoch(EPOCH)
    if cache is not None:
        for step in range(task.steps_per_epoch):
            task.method.inputs(task.batch(EPOCH, step), EPOCH, step)
    return task


class Published:
    """The same training as the authors' code takes a step of it."""

    def __init__(self, task: Training, pair: str) -> None:
        """task: whose batches and first weights it takes, in contiguous tensors."""
        self.task, self.settings = task, compose("train", [f"experiment=kd/c100_gkl/{pair}"])
        plain = torch.contiguous_format
        self.student = copy.deepcopy(task.model).to(memory_format=plain)
        self.teacher = copy.deepcopy(task.method.taught_by).to(memory_format=plain).eval()
        self.prior = torch.full((100, 100), 0.01, dtype=task.compute.dtype, device=task.device)
        groups = task.optimizer.param_groups[0]
        chosen = {name: float(groups[name]) for name in ("lr", "momentum", "weight_decay")}
        self.optimizer = torch.optim.SGD(self.student.parameters(), **chosen)

    def step(self, number: int) -> None:
        """One update."""
        loss = self.settings["distiller"]
        images, draws, y, view, _ = self.task.batch(EPOCH, number)
        x = self.task.see(images, view, draws)
        self.student.train()
        s = self.student(x)
        with torch.no_grad():
            t = self.teacher(x)
            rows = (F.one_hot(y, 100).to(self.prior.dtype) @ self.prior) ** loss["gamma"]
            weights = rows[:, :, None] @ rows[:, None, :]
        gaps = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
        squares = 0.25 * (gaps**2 * weights).sum() / weights.sum()
        tau = loss["temperature"]
        soft = -(F.softmax(t / tau, 1) * F.log_softmax(s / tau, 1)).sum(1).mean()
        self.optimizer.zero_grad()
        (F.cross_entropy(s, y) + loss["alpha"] * squares + loss["beta"] * soft).backward()
        self.optimizer.step()


class Way(NamedTuple):
    """One way to take our step."""

    overrides: tuple[str, ...]
    cached: bool = False  # the teacher's logits are read from where they are kept
    at_least: float | None = None  # times as fast as the published step

    def task(self, pair: str, device: torch.device, folder: str, precision: str | None = None) -> Training:
        chosen = self.overrides if precision is None else (*self.overrides, f"precision={precision}")
        return made("gkl", pair, device, noise(), OURS, *chosen, cache=folder if self.cached else None)


def ways(device: torch.device) -> dict[str, Way]:
    """Ours, by name."""
    plain = ("graph=false",)
    if device.type != "cuda":
        return {
            "live teacher": Way(plain, at_least=1.2),
            "kept logits": Way(plain, cached=True, at_least=3.0),
        }
    return {
        "live teacher, tf32": Way(("precision=tf32", *plain)),
        "kept logits, tf32": Way(("precision=tf32", *plain), cached=True),
        "live teacher, bf16": Way(("precision=bf16", *plain)),
        "live teacher, tf32, replayed": Way(("precision=tf32",), at_least=3.0),
        "live teacher, bf16, replayed": Way(("precision=bf16",)),
    }


def difference(published: Published, task: Training, steps: int = 2) -> str:
    """Both after so many steps from the same weights."""
    for number in range(steps):
        published.step(number)
        task.train_step(EPOCH, number)
    pairs = zip(published.student.parameters(), task.model.parameters(), strict=True)
    largest = max(float((a - b).detach().abs().max()) for a, b in pairs)
    if not largest <= (1e-12 if task.device.type == "cpu" else 1e-10):
        raise SystemExit(
            f"a parameter differs by {largest:.1e} from the published loop's after {steps} steps in float64"
        )
    return f"parameters after {steps} steps: {largest:.0e}"


def measured(
    pair: str, device: torch.device, rounds: int, method_rounds: int, seconds: float | None = None
) -> list[Row]:
    """Every row, in this process. seconds: for the timing of each half; None takes every round."""
    data, on_card = noise(), device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        equal: dict[str, str] = {}
        steps: dict[str, Callable[[], object]] = {}
        known: dict[tuple[bool, bool], str] = {}
        tasks: dict[str, Training] = {}
        for name, way in ways(device).items():
            kind = way.cached, "graph=false" in way.overrides
            if kind not in known:
                plain = made("gkl", pair, device, data, "precision=float64", "graph=false")
                exact = way.task(pair, device, folder, "float64")
                # What is replayed is seen, seen again and recorded, then replayed.
                known[kind] = difference(Published(plain, pair), exact, 2 if kind[1] else 4)
            equal[name] = known[kind]
            tasks[name] = way.task(pair, device, folder)
            steps[name] = under(arithmetic(), partial(tasks[name].train_step, EPOCH, 0))
        plain = made("gkl", pair, device, data, "graph=false")
        steps["published"] = under(AS_PUBLISHED, partial(Published(plain, pair).step, 0))
        times = interleaved(steps, device, rounds, seconds=seconds)
        rows = []
        for name, way in ways(device).items():
            if name.endswith("replayed") and not recorded(tasks[name]):
                equal[name] = f"NOT recorded, but step by step; {equal[name]}"
            row = Row(
                f"GKL-KD: published / {name}",
                ratios(times, "published", name),
                at_least=way.at_least,
                equal=equal[name],
            )
            if on_card:
                row.more["milliseconds"] = {
                    n: round(1e3 * statistics.median(times[n]), 2) for n in ("published", name)
                }
            rows.append(explained(row, steps[name], device))
        chosen = ["precision=tf32"] if on_card else []
        step: dict[str, Callable[[], object]] = {
            m: partial(made(m, pair, device, data, *chosen).train_step, EPOCH, 0) for m in METHODS
        }
        # shows the noise
        step["kd again"] = partial(made("kd", pair, device, data, *chosen).train_step, EPOCH, 0)
        times = interleaved(step, device, method_rounds, seconds=seconds)
        rows += [Row(f"{m} / kd", ratios(times, m, "kd")) for m in step if m != "kd"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--method-rounds", type=int)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--pair", default="resnet32x4_resnet8x4")
    parser.add_argument("--seconds", type=float, help="for the timing; on a GPU 12")
    arguments = parser.parse_args()
    device, pair = torch.device(arguments.device), arguments.pair
    on_card = device.type == "cuda"
    rounds, method_rounds = (
        arguments.rounds or (30 if on_card else 3),
        arguments.method_rounds or (10 if on_card else 1),
    )
    seconds = arguments.seconds or (12.0 if on_card else None)
    rows = spread(
        arguments.processes or (1 if on_card else 3),
        lambda: measured(pair, device, rounds, method_rounds, None if seconds is None else seconds / 2),
    )
    theirs = "the published step in float32 with TF32 convolutions" if on_card else "float32"
    report(
        "distillation",
        f"time ratios of one step; {pair}, batch 64, CIFAR-100's sizes, {theirs}",
        rows,
        device,
    )


if __name__ == "__main__":
    main()
