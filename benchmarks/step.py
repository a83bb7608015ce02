"""One step of GKL adversarial training: the authors' loop, our straight-line restatement of it, and ours, interleaved in one run.

    python benchmarks/step.py [--device cuda] [--rounds 3]
    DKL_REF=<a checkout of the authors' code> python benchmarks/step.py

A step: attack of K steps, weight perturbation (AWP is on), both views forward, backward, update, class prior. The authors' `train`,
`perturb_input`, `dkl_loss`, `TradesAWP` and WideResNet run as they are, on batches that lie ready on the device; only their progress
bar is left out and, without a GPU, `.cuda()`. The restatement is the one that the tests hold the trainer to (tests/test_fidelity.py).
Our step makes its batch, too. Without a GPU: float32, ours contiguous, channels_last, and compiled as well; with one: theirs in float32
with torch's own settings, ours in bfloat16. Targets are against the authors' step, or its restatement where DKL_REF names no checkout.

Before the clock, in float64: equal weights, pictures and random starts; the largest difference over parameters, batch-norm statistics
and class sums after two whole steps, from the others' and from ours compiled.

Beside them, what is measured after each epoch of 50,000 pictures, in percent of the epoch's steps: the authors' `test` goes through all
training pictures and all 10,000 test pictures, ours through the test pictures.
"""

import argparse
import ast
import copy
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from timing import Row, explained, interleaved, noise, ratios, report
from torch import Tensor, nn

from gkl.counter import normal, sample_keys
from trainers.adversarial import AdversarialTraining
from trainers.configuration import build, compose, make
from trainers.robustness import clean_accuracy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from test_fidelity import RECIPES, Restatement

EXPERIMENT, EPOCH = "at/c100_basic_gkl", 20  # AWP is on, averaging has not begun
# what is timed: model, batch, attack's phases, speed-up that is wanted
ON_CPU = (
    ("wrn_16_2", 64, "executed", 1.5),
    ("wrn_16_2", 64, "low", 1.4),
    ("preact_resnet_18", 32, "executed", 1.2),
)
ON_GPU = (("wrn_34_10", 128, "executed", 2.5), ("wrn_16_2", 128, "executed", None), ("preact_resnet_18", 128, "executed", 2.5))  # fmt: skip
TRAIN, TEST = 50_000, 10_000  # pictures of CIFAR
WIDE = {"wrn_16_2": (16, 2), "wrn_34_10": (34, 10)}  # depth, width: what the authors' code has, too


def our_task(
    model: str, batch: int, phases: str, device: torch.device, **settings: Any
) -> AdversarialTraining:
    """Our training, at its first step of EPOCH. Equal arguments begin at equal weights."""
    given = {"batch_size": batch, "bn_groups": 1, **settings}
    config = compose("train", [f"experiment={EXPERIMENT}", f"model={model}", "protocol=official",
                               f"attack.phases={phases}", *(f"{k}={v}".lower() for k, v in given.items())])  # fmt: skip
    torch.manual_seed(0)
    task = build(config, data=noise(), model=make(config["model"], num_classes=100), device=device)
    assert isinstance(task, AdversarialTraining)
    task.start_epoch(EPOCH)
    return task


Batch = tuple[Tensor, Tensor, Tensor]  # pictures, labels, normal numbers for the random start


def batch_and_start(task: AdversarialTraining, step: int) -> Batch:
    """The pictures and labels of a step, and the normal numbers its attack starts from."""
    x, y, view, index = task.batch(EPOCH, step)
    return x, y, normal(sample_keys(0, EPOCH, index, "attack_start") + view, tuple(x.shape[1:]), x.dtype)


class Restated:
    """The restatement, from a task's weights."""

    def __init__(self, task: AdversarialTraining) -> None:
        self.model = copy.deepcopy(task.model)
        self.inner = Restatement(self.model, "official", RECIPES[EXPERIMENT], classes=100, replicas=1)
        self.lr, budget = task.optimizer.param_groups[0]["lr"], task.budget
        self.budget = (budget["epsilon"], budget["steps"], budget["step_size"])

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """A step on each of the batches; the class prior (C, C) they give, NaN where a class is not among them."""
        sums = sum(self.inner.step(x, y, start, self.lr, *self.budget) for x, y, start in batches)
        return sums / sums.sum(1, keepdim=True)


class Published:
    """The authors' loop, from a task's weights."""

    def __init__(self, task: AdversarialTraining, model: str, phases: str, root: Path) -> None:
        script = root / "train_dkl_cifar100.py"
        wanted = {"dkl_loss", "perturb_input", "train", "test"}
        tree = ast.parse(script.read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
        self.device, self.dtype = task.device, task.dtype
        if model in WIDE:
            depth, width = WIDE[model]
            made = module(root / "models/wideresnet.py").WideResNet(depth, 100, width)
            proxy = module(root / "models/wideresnet.py").WideResNet(depth, 100, width)
        else:  # their code for adversarial training has no other network
            made, proxy = copy.deepcopy(task.model), copy.deepcopy(task.model)
        made.load_state_dict(task.model.state_dict())
        self.model = nn.DataParallel(made.to(self.device, self.dtype))
        proxy = nn.DataParallel(proxy.to(self.device, self.dtype))
        group = task.optimizer.param_groups[0]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=group["lr"], momentum=0.9, weight_decay=5e-4
        )
        self.awp = module(root / "utils_awp.py").TradesAWP(
            model=self.model,
            proxy=proxy,
            proxy_optim=torch.optim.SGD(proxy.parameters(), lr=0.2),
            gamma=0.005,
        )
        self.names: dict[str, Any] = {
            "torch": torch, "nn": nn, "F": F, "time": time, "print": lambda *words: None, "best_acc": 0, "NUM_CLASSES": 100, "device": self.device, "Bar": mock.MagicMock(),
            "AverageMeter": module(root / "utils/misc.py").AverageMeter, "accuracy": module(root / "utils/eval.py").accuracy,
            "epsilon": task.attack.epsilon,
            "args": SimpleNamespace(epochs=200, train_budget="low" if phases == "low" else "high", norm="l_inf", alpha=4.0, beta=20.0,
                                    gamma=0.4, T=1.0, aug="basic", awp_warmup=10),
        }  # fmt: skip
        exec(compile(tree, script.name, "exec"), self.names)

    def evaluate(self, batches: Sequence[Batch]) -> None:
        """Loss and accuracy of the batches' pictures."""
        with without_gpu(self.device):
            self.names["test"](self.model, [(x, y) for x, y, _ in batches], nn.CrossEntropyLoss())

    def run(self, batches: Sequence[Batch], same_starts: bool = False) -> Tensor:
        """As the restatement's. same_starts: torch.randn hands out the batches' own."""
        loader, starts = [(x, y) for x, y, _ in batches], iter([start for _, _, start in batches])
        drawn = (
            mock.patch.object(torch, "randn", lambda shape: next(starts)) if same_starts else nullcontext()
        )
        with without_gpu(self.device), in_double(self.dtype), drawn:
            return self.names["train"](
                self.model, loader, self.optimizer, EPOCH, self.awp, [150], [0.9996], [{}]
            )[2]


@contextmanager
def without_gpu(device: torch.device) -> Iterator[None]:
    """Inside, `.cuda()` leaves a tensor where it is, if there is no GPU."""
    if device.type == "cuda":
        yield
    else:
        with mock.patch.object(torch.Tensor, "cuda", lambda self: self):
            yield


@contextmanager
def in_double(dtype: torch.dtype) -> Iterator[None]:
    """Inside, what the authors' code makes in float32 is made in `dtype`."""
    torch.set_default_dtype(dtype)
    try:
        with mock.patch.object(torch.Tensor, "float", lambda self: self.to(dtype)):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def module(path: Path) -> ModuleType:
    """A file of the authors' code, by its path."""
    spec = importlib.util.spec_from_file_location(f"published_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def equality(model: str, batch: int, phases: str, device: torch.device, root: Path | None) -> dict[str, str]:
    """What is found equal after two whole steps in float64, by name of the other side."""
    task = our_task(model, batch, phases, device, precision="float64", channels_last=True, compile=False)
    others: dict[str, Restated | Published] = {"restatement": Restated(task)}
    if root is not None:
        others["authors'"] = Published(task, model, phases, root)
    batches = [batch_and_start(task, step) for step in range(2)]
    for step in range(2):
        task.train_step(EPOCH, step)
    ours = {**task.model.state_dict(), "prior": task.prior.sums / task.prior.sums.sum(1, keepdim=True)}
    fast = our_task(model, batch, phases, device, precision="float64", channels_last=True, compile=True)
    for step in range(2):
        fast.train_step(EPOCH, step)
    largest = max(float((v - ours[k]).abs().max()) for k, v in fast.model.state_dict().items())
    found = {"compiled": f"compiled against not {largest:.0e}"}
    for name, other in others.items():
        prior = other.run(batches, same_starts=True) if isinstance(other, Published) else other.run(batches)
        theirs = {
            **{k.removeprefix("module."): v for k, v in other.model.state_dict().items()},
            "prior": prior.to(ours["prior"].dtype),
        }
        largest = max(
            float((v - theirs[k]).nan_to_num().abs().max()) for k, v in ours.items() if v.is_floating_point()
        )
        assert ours.keys() == theirs.keys() and not any(
            v.isnan().any() for k, v in ours.items() if k != "prior"
        )
        found[name] = f"float64, two steps: {largest:.0e}"
    return found


def rows_of(
    model: str,
    batch: int,
    phases: str,
    target: float | None,
    device: torch.device,
    root: Path | None,
    rounds: int,
) -> list[Row]:
    """The ratios of one network and attack."""
    equal = equality(model, batch // 16, phases, device, root)
    compiled = equal.pop("compiled")
    plain = our_task(model, batch, phases, device, channels_last=False, compile=False)
    batches = [batch_and_start(plain, 0)]
    variants: dict[str, Callable[[], object]] = {}
    if root is not None:
        published = Published(plain, model, phases, root)
        variants["authors'"] = lambda: published.run(batches)
        variants["authors' evaluation"] = lambda: published.evaluate(batches)
    restated = Restated(plain)
    variants["restatement"] = lambda: restated.run(batches)
    half = "bf16" if device.type == "cuda" else "float32"
    last = our_task(model, batch, phases, device, channels_last=True, compile=False, precision=half)
    fast = our_task(model, batch, phases, device, channels_last=True, compile=True, precision=half)
    for name, task in {"contiguous": plain, "channels_last": last, "channels_last, compiled": fast}.items():
        variants[name] = lambda task=task: task.train_step(EPOCH, 0)
    variants["evaluation"] = lambda: clean_accuracy(last.model, last.data, device)
    torch.backends.cudnn.allow_tf32 = (
        True  # torch's default, which the authors' script leaves; ours computes in bf16
    )
    times = interleaved(variants, device, rounds)
    against = "authors'" if root is not None else "restatement"
    steps = plain.budget["steps"]
    rows = []
    for base in equal:
        for name in ("contiguous", "channels_last", "channels_last, compiled"):
            final = base == against and name.endswith("compiled")
            what = f"{model}, K = {steps}, {base} / {name}"
            more = {
                "milliseconds": {n: round(1000 * statistics.median(times[n]), 1) for n in (base, name)},
                "batch": batch,
            }
            bound = target if final else None
            same = f"{equal[base]}; {compiled}" if name.endswith("compiled") else equal[base]
            row = Row(what, ratios(times, base, name), at_least=bound, equal=same, more=more)
            # The compiled step's own convolutions hide in its kernels' names; the same step uncompiled shows them.
            rows.append(explained(row, variants["channels_last"], device))
    each = {
        "channels_last": ("evaluation", len(last.data.test_labels), TEST),
        "authors'": ("authors' evaluation", batch, TRAIN + TEST),
    }
    for name, (evaluation, timed, seen) in each.items():
        if name in variants:
            percent = 100 * (seen / timed) / (TRAIN / batch)
            shares = [percent * share for share in ratios(times, evaluation, name)]
            rows.append(Row(f"{model}, K = {steps}, {name}: evaluation, percent of an epoch", shares))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    root = None
    if reference := os.environ.get("DKL_REF"):
        root = Path(reference) / "DKLv2/Adv-training-dkl"
        if not (root / "train_dkl_cifar100.py").is_file():
            parser.error(
                f"DKL_REF={reference} has no DKLv2/Adv-training-dkl/train_dkl_cifar100.py; name a checkout of the authors' code"
            )
    rows = []
    for setting in ON_GPU if device.type == "cuda" else ON_CPU:
        rows += rows_of(*setting, device, root, arguments.rounds)
    report("step", "time(theirs) / time(ours) of one adversarial training step, AWP on", rows, device)


if __name__ == "__main__":
    main()
