"""What a GPU does for this repository, in at most ten minutes: is it right, how fast, how long the paper's runs take, what memory they need.

    make gpu
    DKL_REF=<a checkout of the authors' code> python benchmarks/gpu.py [--only right fast hours memory]

Right: tests/system/test_gpu*.py. Fast: the benchmarks of the loss, the step, distillation and AutoAttack, beside their targets and torch's own.
Hours: a step of each kind of training is timed with the settings its runs have, and the cost model (trainers/runs/cost.py) told what that
makes in FLOP/s; reading and decoding pictures in files is not in it. Memory: the peak of such a step, and for each table's largest
run that of two small batches, from which the paper's batch follows, as what a network keeps grows with the batch. What nine minutes
have not come to is left out. Writes gpu-<card>.json and the benchmarks' own files into results/benchmarks, or into GKL_BENCHMARKS. Without a
GPU: one line, exit code 2.
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, TypeVar

import clip
import distillation
import llava
import segmentation
import semi_supervised
import step
import table5
import timing
import torch
from timing import ROOT, noise, peak_gib, timed

from trainers.errors import RunError
from trainers.runs.compose import compose
from trainers.runs.cost import SIZES, Rate, Size, forward_flops, needed_flops
from trainers.runs.plan import cells, load_table
from trainers.runs.targets import instantiate, locate

Step, Row = Callable[[], object], TypeVar("Row")
say = partial(print, flush=True)
VERSIONS, PARTS = ("driver", "torch", "triton"), ("right", "fast", "hours", "memory")
RUN = {  # seconds that each may take
    # Most of both is the compilation of kernels: several processes, and time for what a first run has to make.
    "right: the tests": (
        140,
        "-m pytest -q -n 8 --dist load -p no:cacheprovider --tb=short tests/system/test_gpu*.py",
    ),
    "fast: the loss": (90, "benchmarks/loss.py"),
    "fast: a step": (110, "benchmarks/step.py --settings 2"),
    "fast: distillation": (75, "benchmarks/distillation.py"),
    "fast: AutoAttack": (90, "benchmarks/autoattack.py"),
}
LAST = 540  # seconds after which no further step is begun: the ten minutes end with it
# A step of each kind: its experiment, overrides, epoch; and the runs of that kind, by table.
KINDS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "at": (step.BASIC, (), step.EPOCH),
    "kd": ("kd/c100_gkl/resnet32x4_resnet8x4", (), distillation.EPOCH),
    "in": ("kd/in_gkl/resnet34_resnet18", ("batch_size=128",), 10),
    "ssl": ("ssl/fixmatch_gkl", (), 1),
    "seg": ("seg/apd_gkl", (), 1),
    "clip": ("clip/gkl", ("batch_size=128", "bn_groups=1"), 1),
    # Texts as long as those that the cost model counts, four at once, for cards of 24 GB.
    "llava": ("llava/gkl", ("batch_size=8", "accumulate=2", "data.length=452"), 2),
}
HOURS = {
    "3, 4": ("at", ("at/c100_basic_kl", "at/c100_basic_gkl", "at/c10_basic_kl", "at/c10_basic_gkl")),
    "7, on one card": ("clip", ("clip/baseline", "clip/kl", "clip/gkl")),
    "8, on one card": ("llava", ("llava/baseline", "llava/kl", "llava/gkl")),
    "22": ("ssl", ("ssl/fixmatch_hard", "ssl/fixmatch_gkl", "ssl/mean_teacher_gkl")),
    "23": ("seg", ("seg/baseline", "seg/apd_kl", "seg/apd_gkl")),
    "5": ("in", ("kd/in_kd/resnet34_resnet18", "kd/in_gkl/resnet34_resnet18")),
    "17": ("kd", ("kd/c100_kd/resnet32x4_resnet8x4", "kd/c100_gkl/resnet32x4_resnet8x4")),
}
# Each table's largest run, two batches that are tried, the batch it has. DM-AT's network has the pictures of any other.
LARGEST: dict[str, tuple[str, tuple[str, ...], tuple[int, int], int]] = {
    "1, 10 to 12, 14, 20, 21": (step.BASIC, (), (32, 64), 128),
    "3, 4, 15, 16: DM-AT": (step.BASIC, ("model=wrn_28_10_swish", "bn_groups=1"), (32, 64), 2048),
    "2, 6, 13, 24": ("kd/lt_vanilla/imagenet_resnext_101_32x4d", (), (8, 16), 128),
    "1kd": ("kd/in_gkl/resnet34_resnet18", (), (16, 32), 512),
    "5": ("kd/in_vanilla/imagenet_resnet_50", (), (16, 32), 512),
    "7, of 128 pairs": ("clip/gkl", ("bn_groups=1",), (16, 32), 128),
    "8, of 16 of the longest texts": ("llava/gkl", (), (1, 2), 16),
    "22": ("ssl/mean_teacher_gkl", (), (8, 16), 8),
    "23, on one card": ("seg/apd_gkl", ("bn_groups=1",), (2, 4), 8),
    "17, 18": ("kd/c100_gkl/resnet32x4_resnet8x4", (), (32, 64), 64),
    "19": ("kd/strong_gkl/beitv2_resnet50", (), (8, 16), 2048),
}


def size_of(config: Mapping[str, Any]) -> Size:
    return SIZES[config["data"]["_target_"].rpartition("/")[2]]


def stepper(name: str, device: torch.device, own: Sequence[str], epoch: int) -> tuple[Step, dict[str, Any]]:
    """A step of an experiment with the settings that its runs have and one's own, on noise, and its configuration."""
    gc.collect()  # the training before, which would lie on the card beside this one
    config = compose("train", [f"experiment={name}", *own])
    size, (kind, row) = size_of(config), (name.partition("/")[0], name.rpartition("/")[2])
    if kind == "ssl":
        task: Any = semi_supervised.made(row, config["model"]["name"], device, *own)
    elif kind == "seg":
        shared = [f"{key}={config[key]}" for key in ("batch_size", "bn_groups")]
        task = segmentation.made(device, size.side, *shared, *own)
    elif kind == "clip":
        task = clip.on_noise(row, device, *own)
    elif kind == "llava":
        task, epoch = llava.on_noise(row, device, *own), min(epoch, config["epochs"])
        task.start_epoch(epoch)
    elif size.classes == 1000:
        own = [o for o in own if not o.startswith(("batch_size", "bn_groups"))]
        return table5.stepper(name, device, config["batch_size"], size.side, *own), config
    elif kind == "kd":
        method, pair = name.removeprefix("kd/c100_").split("/")
        task = distillation.made(method, pair, device, noise(), *own)
    else:
        phases, network = config["attack"]["phases"], config["model"]["name"]
        kept = {key: config[key] for key in ("precision", "channels_last", "bn_groups", "graph")}
        task = step.our_task(step.Setting(name, network, config["batch_size"], phases, None), device, **kept)
    return partial(task.train_step, epoch, 0), config


def step_flops(config: Mapping[str, Any], epoch: int) -> float:
    """FLOPs of a step, as the cost model counts them."""
    attack, size = instantiate(config["attack"]) if config.get("attack") else None, size_of(config)
    steps = attack.budget(epoch, config["epochs"])["steps"] if attack else 0
    counted = locate(config["method"]["_target_"]).forwards(config, epoch, steps)  # type: ignore[attr-defined]
    networks = {name: reduce(lambda at, key: at[key], name.split("."), config) for name in counted}
    each = sum(n * forward_flops(networks[name], size.side, size.classes) for name, n in counted.items())
    return float(config["batch_size"] * each)


def measured(kind: str, device: torch.device, seconds: float) -> dict[str, float]:
    """A step of a kind: its seconds, batch, peak of memory (GiB), and what it sustains (TFLOP/s)."""
    name, own, epoch = KINDS[kind]
    call, config = stepper(name, device, own, epoch)
    peak = peak_gib(call, device, calls=3)  # as it is, recorded, replayed
    calls = max(1, math.ceil(seconds / timed(call, device)))
    each = timed(lambda: [call() for _ in range(calls)], device) / calls
    tflops = step_flops(config, epoch) / each / 1e12
    return {"seconds": each, "batch": config["batch_size"], "peak": peak, "tflops": tflops}


def counted_peak(tables: str, device: torch.device) -> float:
    """GiB of a step of the tables' largest run, from the peaks of the two batches that are tried, step by step."""
    name, own, tried, batch = LARGEST[tables]
    peaks = []
    for some in tried:
        call, _ = stepper(name, device, [*own, f"batch_size={some}", "graph=false"], step.EPOCH)
        peaks.append(peak_gib(call, device))
        del call
    return peaks[1] + (batch - tried[1]) * (peaks[1] - peaks[0]) / (tried[1] - tried[0])


def verdict(rate: Rate | None, dm: float, memory: float, cards: int) -> str:
    """Whether this machine can run `make table3`, and in how many hours. rate: of its steps; None where one does not fit. dm: GiB of DM-AT."""
    if rate is None:
        return (
            "this machine cannot run make table3: a step of WRN-34-10, batch 128, does not fit into the card"
        )
    runs = cells(load_table("3"), scale="paper", protocol="official")
    hours = sum(needed_flops(run.config, SIZES["cifar100"]) for run in runs) / rate.flops_an_hour
    line = f"this machine can run make table3: {len(runs)} runs, {hours:.0f} hours on one card"
    line += f", {hours / cards:.0f} on all {cards}" if cards > 1 else ""
    if dm > memory:
        needed = 2 ** math.ceil(math.log2(dm / (0.9 * memory)))
        line += f"; its DM-AT rows (about {dm:.0f} GiB) need {needed} such cards (DEVICES={needed}), the others one"
    return line


def in_time(rows: Mapping[str, Row], began: float) -> Iterator[tuple[str, Row]]:
    """Rows by name until LAST seconds after `began`; says which are left out."""
    for name, row in rows.items():
        if time.perf_counter() - began < LAST:
            yield name, row
        else:
            say(f"{name}: left out, as {LAST} s are over (--only hours memory)")


def told(words: str, seconds: float) -> str:
    """Run a command of Python's that prints for itself; how it ended."""
    paths = [str(p) for word in words.split() for p in (sorted(ROOT.glob(word)) if "*" in word else [word])]
    try:
        code = subprocess.run([sys.executable, *paths], cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:g} s"
    return "done" if code == 0 else f"failed with exit code {code}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    only = parser.parse_args(arguments).only
    if not torch.cuda.is_available():
        say(f"no GPU that torch {torch.__version__} sees, and make gpu measures one; make bench serves here")
        return 2
    began, device = time.perf_counter(), torch.device("cuda")
    here, cards = timing.machine(device), torch.cuda.device_count()
    say(f"{cards} x {here['name']}, {here['memory']} GiB;", *(f"{key} {here[key]}" for key in VERSIONS))
    found: dict[str, Any] = {"benchmark": "gpu", "machine": {**here, "cards": cards}}
    for what, (seconds, words) in RUN.items():
        if what.partition(":")[0] in only:
            found[what] = told(words, seconds)
            say(f"{what} {found[what]}\n")
    dm, rates = 0.0, dict[str, Rate]()
    for kind, (name, _, _) in in_time(KINDS, began) if "hours" in only else ():
        try:
            seen = measured(kind, device, seconds=3.0)
        except torch.OutOfMemoryError:
            say(f"{name}: a step does not fit into {here['memory']} GiB")
            continue
        except (ValueError, ImportError, RunError) as error:  # without an extra
            say(f"{name}: not timed ({str(error)[:120]})")
            continue
        rates[kind] = Rate(seen["tflops"], here["name"])
        found.setdefault("steps", {})[name] = seen
        each = f"{1000 * seen['seconds']:.1f} ms, {seen['peak']:.1f} GiB (measured)"
        say(f"{name}, a step of batch {seen['batch']}: {each}, {rates[kind]}")
    for number, (kind, names) in HOURS.items():
        for name in names if kind in rates else ():
            config = compose("train", [f"experiment={name}"])
            hours = needed_flops(config, size_of(config)) / rates[kind].flops_an_hour
            found.setdefault("hours", {}).setdefault(number, {})[name] = hours
            say(f"Table {number}, {name}: {hours:.1f} hours a run, {3 * hours:.0f} for three seeds")
    for tables, (name, own, tried, batch) in in_time(LARGEST, began) if "memory" in only else ():
        try:
            needed = counted_peak(tables, device)
        except Exception as error:  # the small batches may not fit either, or timm not make the network
            say(f"Tables {tables}: not counted ({(str(error).splitlines() or [repr(error)])[0][:120]})")
            continue
        dm = needed if "DM-AT" in tables else dm
        found.setdefault("memory", {})[tables] = {"experiment": name, "batch": batch, "GiB": needed}
        counted = f"{needed:.1f} GiB (counted from {tried[0]} and {tried[1]})"
        say(f"Tables {tables}: {' '.join((name, *own))}, batch {batch}: {counted}")
    found["seconds"] = round(time.perf_counter() - began)
    if "hours" in only:
        found["table3"] = verdict(rates.get("at"), dm, here["memory"], cards)
    timing.RESULTS.mkdir(parents=True, exist_ok=True)
    file = timing.RESULTS / f"gpu-{here['name'].lower().replace(' ', '-')}.json"
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    say(f"wrote {file} after {found['seconds']} s")
    say(found.get("table3", "whether this machine can run make table3: --only hours"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
