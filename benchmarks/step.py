"""One step of GKL adversarial training: the authors' loop, our straight-line restatement of it, and ours, interleaved in one run.

    python benchmarks/step.py [--device cuda] [--rounds 3] [--seconds 50] [--compile] [--settings 2]
    DKL_REF=<a checkout of the authors' code> python benchmarks/step.py

A step: attack of K steps, weight perturbation (AWP is on), both views forward, backward, update, class prior. The authors' `train`,
`perturb_input`, `dkl_loss`, `TradesAWP` and WideResNet run as they are, on batches that lie ready on the device; only their progress
bar is left out and, without a GPU, `.cuda()`. The restatement is the one that the tests hold the trainer to (tests/system/test_fidelity.py).
Our step makes its batch, too. Without a GPU: float32, ours contiguous, channels_last, and compiled as well. With one: theirs in float32
with the switches that their script leaves (TF32 in convolutions), ours channels_last in bfloat16 and in TF32, each step by step and,
with `graph`, replayed as CUDA graphs; compiled only with --compile. Targets are against the authors' step, or its restatement where
DKL_REF names no checkout; on a GPU the fastest of ours is held to them, and to how much of its time the card works.

Before the clock, in float64, from a class prior that is not uniform: equal weights, pictures and random starts; the largest difference
over parameters, batch-norm statistics and class sums after two whole steps, from the others' and from ours compiled or replayed.

Beside them, what is measured after each epoch of 50,000 pictures, in percent of the epoch's steps: the authors' `test` goes through all
training pictures and all 10,000 test pictures, ours through the test pictures.
"""

import argparse
import ast
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from timing import (
    AS_PUBLISHED,
    Row,
    arithmetic,
    busy,
    explained,
    interleaved,
    noise,
    ratios,
    recorded,
    report,
    under,
)
from torch import Tensor, nn

from gkl.rng import normal, sample_keys
from trainers.loop.accuracy import clean_accuracy
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build
from trainers.runs.targets import instantiate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.system.test_fidelity import RECIPES, Restatement

EPOCH = 20  # AWP is on, averaging has not begun
BASIC, AUTOAUG = "at/c100_basic_gkl", "at/c100_autoaug"


class Setting(NamedTuple):
    """What is timed. phases: the attack's. target: the speed-up that is wanted."""

    experiment: str
    model: str
    batch: int
    phases: str
    target: float | None


ON_CPU = (
    Setting(BASIC, "wrn_16_2", 64, "executed", 1.5),
    Setting(BASIC, "wrn_16_2", 64, "low", 1.4),
    Setting(BASIC, "preact_resnet_18", 32, "executed", 1.2),
    Setting(AUTOAUG, "wrn_16_2", 32, "executed", None),
)
ON_GPU = (
    Setting(BASIC, "wrn_34_10", 128, "executed", 4.0),
    Setting(BASIC, "preact_resnet_18", 128, "executed", 5.0),
    Setting(AUTOAUG, "wrn_34_10", 128, "executed", None),
    Setting(BASIC, "wrn_16_2", 128, "executed", None),
)
TRAIN, TEST = 50_000, 10_000  # pictures of CIFAR
WIDE = {"wrn_16_2": (16, 2), "wrn_34_10": (34, 10)}  # depth, width: what the authors' code has, too
CLASSES = 100


def our_config(setting: Setting, **settings: Any) -> dict[str, Any]:
    given = {"batch_size": setting.batch, "bn_groups": 1, **settings}
    return compose("train", [f"experiment={setting.experiment}", f"model={setting.model}", "protocol=official",
                             f"attack.phases={setting.phases}", *(f"{k}={v}".lower() for k, v in given.items())])  # fmt: skip


def our_task(setting: Setting, device: torch.device, **settings: Any) -> Training:
    """Our training, at its first step of EPOCH. Equal settings begin at equal weights, and at one prior that is not uniform."""
    config = our_config(setting, **settings)
    torch.manual_seed(0)
    task = build(config, data=noise(), model=instantiate(config["model"], num_classes=CLASSES), device=device)
    prior = task.method.views.prior
    generator = torch.Generator().manual_seed(0)
    probs = (2.0 * torch.randn(CLASSES, CLASSES, generator=generator, dtype=torch.float64)).softmax(1)
    prior.load_state_dict({**prior.state_dict(), "probs": probs})
    task.start_epoch(EPOCH)
    return task


Batch = tuple[Tensor, Tensor, Tensor]  # pictures, labels, normal numbers for the random start


def batch_and_start(task: Training, step: int) -> Batch:
    """The pictures and labels of a step, and the normal numbers its attack starts from; all on the task's device."""
    images, draws, y, view, index = task.batch(EPOCH, step)
    x = task.see(images, view, draws)
    keys = sample_keys(0, EPOCH, index, "attack_start").to(x.device) + view
    return x, y, normal(keys, tuple(x.shape[1:]), x.dtype)


def plain_network(task: Training, setting: Setting) -> nn.Module:
    """The task's network with torch's own batch norm, in contiguous tensors, at the task's weights."""
    network: nn.Module = instantiate(our_config(setting)["model"], num_classes=CLASSES)
    network.load_state_dict(task.model.state_dict())
    return network.to(task.device, task.compute.dtype)


class Restated:
    """The restatement, from a task's weights and prior."""

    def __init__(self, task: Training, setting: Setting) -> None:
        self.model = plain_network(task, setting)
        self.inner = Restatement(
            self.model, "official", RECIPES[setting.experiment], classes=CLASSES, replicas=1
        )
        self.inner.prior = task.method.views.prior.probs.clone()
        self.lr, budget = float(task.optimizer.param_groups[0]["lr"]), task.method.budget
        self.budget = (budget["epsilon"], budget["steps"], budget["step_size"])

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """A step on each of the batches; the class prior (C, C) they give, NaN where a class is not among them."""
        sums = sum(self.inner.step(x, y, start, self.lr, *self.budget) for x, y, start in batches)
        return sums / sums.sum(1, keepdim=True)


class Published:
    """The authors' loop, from a task's weights and prior."""

    def __init__(self, task: Training, setting: Setting, root: Path) -> None:
        config, model = our_config(setting), setting.model
        script = root / "train_dkl_cifar100.py"
        wanted = {"dkl_loss", "perturb_input", "train", "test"}
        tree = ast.parse(script.read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
        self.device, self.dtype = task.device, task.compute.dtype
        if model in WIDE:
            depth, width = WIDE[model]
            made = module(root / "models/wideresnet.py").WideResNet(depth, 100, width)
            proxy = module(root / "models/wideresnet.py").WideResNet(depth, 100, width)
        else:  # their code for adversarial training has no other network
            made, proxy = plain_network(task, setting), plain_network(task, setting)
        made.load_state_dict(task.model.state_dict())
        one = [self.device.index or 0] if self.device.type == "cuda" else None
        self.model = nn.DataParallel(made.to(self.device, self.dtype), one)
        proxy = nn.DataParallel(proxy.to(self.device, self.dtype), one)
        group = task.optimizer.param_groups[0]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=float(group["lr"]), momentum=0.9, weight_decay=5e-4
        )
        self.awp = module(root / "utils_awp.py").TradesAWP(
            model=self.model,
            proxy=proxy,
            proxy_optim=torch.optim.SGD(proxy.parameters(), lr=0.2),
            gamma=0.005,
        )
        weights = config["method"]["view_weights"]
        self.names: dict[str, Any] = {
            "torch": torch, "nn": nn, "F": F, "time": time, "print": lambda *words: None, "best_acc": 0, "NUM_CLASSES": CLASSES, "device": self.device, "Bar": mock.MagicMock(),
            "AverageMeter": module(root / "utils/misc.py").AverageMeter, "accuracy": module(root / "utils/eval.py").accuracy,
            "epsilon": task.method.attack.epsilon,
            "args": SimpleNamespace(
                epochs=config["epochs"], train_budget="low" if setting.phases == "low" else "high", norm="l_inf",
                alpha=config["loss"]["beta"], beta=config["loss"]["alpha"], gamma=config["loss"]["gamma"],  # their names are the other way round
                T=config["prior"]["temperature"], aug="basic" if len(weights) == 1 else "autoaug", aug_weight=weights[-1], awp_warmup=10,
            ),
        }  # fmt: skip
        self.views, self.prior = len(weights), task.method.views.prior.probs.clone()
        exec(compile(tree, script.name, "exec"), self.names)

    def evaluate(self, batches: Sequence[Batch]) -> None:
        """Loss and accuracy of the batches' pictures."""
        with without_gpu(self.device):
            self.names["test"](self.model, [(x, y) for x, y, _ in batches], nn.CrossEntropyLoss())

    def run(self, batches: Sequence[Batch], same_starts: bool = False) -> Tensor:
        """As the restatement's. same_starts: torch.randn hands out the batches' own."""
        starts = iter([start for _, _, start in batches])
        loader = [
            (x if self.views == 1 else list(x.chunk(self.views)), y.chunk(self.views)[0])
            for x, y, _ in batches
        ]
        drawn = (
            mock.patch.object(torch, "randn", lambda shape: next(starts)) if same_starts else nullcontext()
        )
        with without_gpu(self.device), in_double(self.dtype), drawn:
            return self.names["train"](
                self.model, loader, self.optimizer, EPOCH, self.awp, [150], [0.9996], [{}], weight=self.prior
            )[2]


@contextmanager
def without_gpu(device: torch.device) -> Iterator[None]:
    """Inside, `.cuda()` brings a tensor to the device, if that is no GPU."""
    if device.type == "cuda":
        yield
    else:
        with mock.patch.object(torch.Tensor, "cuda", lambda self: self.to(device)):
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


def equality(setting: Setting, device: torch.device, root: Path | None, compile: bool) -> dict[str, str]:
    """What is found equal after two whole steps in float64, by name of the other side; ours otherwise carried out as `ours`.

    compile: whether that is the compiled network; else, where there are graphs, the replayed step after four.
    """
    exact: dict[str, Any] = {"precision": "float64", "channels_last": True}
    task = our_task(setting, device, **exact, compile=False, graph=False)
    others: dict[str, Restated | Published] = {"restatement": Restated(task, setting)}
    if root is not None:
        others["authors'"] = Published(task, setting, root)
    batches = [batch_and_start(task, step) for step in range(2)]
    for step in range(2):
        task.train_step(EPOCH, step)
    ours = {key: value.clone() for key, value in task.model.state_dict().items()}
    sums = task.method.views.prior.sums
    ours["prior"] = sums / sums.sum(1, keepdim=True)
    found = {}
    for name, other in others.items():
        prior = other.run(batches, same_starts=True) if isinstance(other, Published) else other.run(batches)
        theirs = {
            **{k.removeprefix("module."): v for k, v in other.model.state_dict().items()},
            "prior": prior.to(ours["prior"].dtype),
        }
        assert ours.keys() == theirs.keys() and not any(
            bool(v.isnan().any()) for k, v in ours.items() if k != "prior"
        )
        largest = max(
            float((v - theirs[k]).nan_to_num().abs().max()) for k, v in ours.items() if v.is_floating_point()
        )
        found[name] = f"float64, two steps: {largest:.0e}"
    ways: dict[str, tuple[dict[str, Any], int]] = {}
    if compile:
        ways["compiled"] = {"compile": True, "graph": False}, 2
    if device.type == "cuda":
        ways["replayed"] = (
            {"compile": False, "graph": "auto"},
            4,
        )  # the third step is the first that is replayed
    said = []
    for name, (way, steps) in ways.items():
        other_way = our_task(setting, device, **exact, **way)
        one_way = our_task(setting, device, **exact, compile=False, graph=False)
        for step in range(steps):
            one_way.train_step(EPOCH, step)
            other_way.train_step(EPOCH, step)
        states = one_way.model.state_dict(), other_way.model.state_dict()
        said.append(
            f"{name} against not {max(float((states[0][k] - states[1][k]).abs().max()) for k in states[0]):.0e}"
        )
    return {**found, "ours": ", ".join(said)}


def our_ways(device: torch.device, compile: bool) -> dict[str, dict[str, Any]]:
    """The settings under which ours is timed, by name."""
    if device.type != "cuda":
        ways: dict[str, dict[str, Any]] = {
            "contiguous": {"channels_last": False, "compile": False},
            "channels_last": {"channels_last": True, "compile": False},
        }
        return ways | (
            {"channels_last, compiled": {"channels_last": True, "compile": True}} if compile else {}
        )
    ways = {}
    for precision in ("bf16", "tf32"):
        common = {"channels_last": True, "precision": precision}
        ways[precision] = {**common, "compile": False, "graph": False}
        ways[f"{precision}, replayed"] = {**common, "compile": False, "graph": "auto"}
        if compile:
            ways[f"{precision}, compiled"] = {**common, "compile": True, "graph": False}
    return ways


def rows_of(
    setting: Setting,
    device: torch.device,
    root: Path | None,
    rounds: int,
    *,
    compile: bool,
    seconds: float | None = None,
) -> list[Row]:
    """The ratios of one network and attack."""
    on_card, batch = device.type == "cuda", setting.batch
    few = setting._replace(batch=4 if on_card else max(2, batch // 16))
    if on_card:  # float64 of the large network takes longer than all that is timed
        few = few._replace(model={"wrn_34_10": "wrn_16_2"}.get(setting.model, setting.model))
    equal = equality(few, device, root, compile)
    ours_equal = equal.pop("ours")
    variants: dict[str, Callable[[], object]] = {}
    tasks: dict[str, Training] = {}
    for name, way in our_ways(device, compile).items():
        tasks[name] = task = our_task(setting, device, **way)
        variants[name] = under(arithmetic(), lambda task=task: task.train_step(EPOCH, 0))
    ways = list(tasks)
    plain = our_task(setting, device, channels_last=False, compile=False, graph=False)
    batches = [batch_and_start(plain, 0)]
    if root is not None:
        published = Published(plain, setting, root)
        variants["authors'"] = under(AS_PUBLISHED, lambda: published.run(batches))
        variants["authors' evaluation"] = under(AS_PUBLISHED, lambda: published.evaluate(batches))
    against = "authors'" if root is not None else "restatement"
    if against == "restatement" or not on_card:
        restated = Restated(plain, setting)
        variants["restatement"] = under(AS_PUBLISHED, lambda: restated.run(batches))
    last = tasks[ways[0] if on_card else "channels_last"]
    variants["evaluation"] = lambda: clean_accuracy(last.model, last.data, device)
    times = interleaved(variants, device, rounds, seconds=seconds)
    fastest = min(ways, key=lambda name: statistics.median(times[name])) if on_card else ways[-1]
    views = "" if setting.experiment == BASIC else ", AutoAugment"
    title = f"{setting.model}{views}, K = {plain.method.budget['steps']}"
    rows = []
    for base in [name for name in equal if name in times]:
        for name in ways:
            more = {
                "milliseconds": {n: round(1000 * statistics.median(times[n]), 1) for n in (base, name)},
                "batch": batch,
            }
            bound = setting.target if base == against and name == fastest else None
            other = "compiled" in name or "replayed" in name
            same = f"{equal[base]}; {ours_equal}" if other and ours_equal else equal[base]
            if "replayed" in name and not recorded(tasks[name]):
                same = f"NOT recorded, but step by step; {same}"
            row = Row(
                f"{title}, {base} / {name}", ratios(times, base, name), at_least=bound, equal=same, more=more
            )
            # A CPU's compiled step hides its convolutions in its kernels' names; the same step uncompiled shows them.
            rows.append(explained(row, variants[name if on_card else "channels_last"], device))
    if on_card:
        at_work = Row(f"{title}, {fastest}: the card works, percent of a step", [busy(variants[fastest], device)],
                      at_least=90.0 if setting.target else None)  # fmt: skip
        rows.append(explained(at_work, variants[fastest], device))
    each = {
        fastest if on_card else "channels_last": ("evaluation", len(last.data.test_labels), TEST),
        "authors'": ("authors' evaluation", len(batches[0][1]), TRAIN + TEST),
    }
    for name, (evaluation, timed, seen) in each.items():
        if name in variants:
            percent = 100 * (seen / timed) / (TRAIN / batch)
            shares = [percent * share for share in ratios(times, evaluation, name)]
            rows.append(Row(f"{title}, {name}: evaluation, percent of an epoch", shares))
    return rows


def checkout(reference: str | None) -> Path | None:
    """Where the authors' scripts lie in their checkout; None without one."""
    if not reference:
        return None
    root = Path(reference) / "DKLv2/Adv-training-dkl"
    if not (root / "train_dkl_cifar100.py").is_file():
        raise SystemExit(
            f"error: DKL_REF={reference} has no DKLv2/Adv-training-dkl/train_dkl_cifar100.py; name a checkout of the authors' code"
        )
    return root


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--seconds", type=float, help="after which no more is begun but the first two; on a GPU 50"
    )
    parser.add_argument("--settings", type=int, help="only the first so many")
    parser.add_argument("--compile", action="store_true", help="on a GPU, too: takes minutes")
    arguments = parser.parse_args()
    device, root = torch.device(arguments.device), checkout(os.environ.get("DKL_REF"))
    on_card = device.type == "cuda"
    seconds = arguments.seconds or (50.0 if on_card else float("inf"))
    began, rows = time.perf_counter(), []
    settings = (ON_GPU if on_card else ON_CPU)[: arguments.settings]
    for number, setting in enumerate(settings):
        left = seconds - (time.perf_counter() - began)
        if left <= 0 and number >= 2:
            print(
                f"{setting.experiment}, {setting.model}: left out, {seconds:g} s are over (--seconds)",
                flush=True,
            )
            continue
        rows += rows_of(
            setting, device, root, arguments.rounds or (20 if on_card else 3), compile=arguments.compile or not on_card,
            seconds=max(8.0, left / 4) if on_card else None,
        )  # fmt: skip
        if on_card:
            torch.cuda.empty_cache()
    report("step", "time(theirs) / time(ours) of one adversarial training step, AWP on", rows, device)


if __name__ == "__main__":
    main()
