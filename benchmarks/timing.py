"""What the benchmarks share: the clock, turns, pictures of CIFAR-100's shape, and the file a result goes to.

    times = interleaved({"ours": step, "theirs": other}, device, rounds=15)
    row = Row("WRN-16-2, K = 5", ratios(times, "theirs", "ours"), at_least=1.5)
    report("step", [explained(row, step, device)], device)

`report` prints each ratio beside its target and writes <name>-<cpu or card>.json into results/benchmarks, or into the folder that
GKL_BENCHMARKS names; from these files table.py makes the table of the docs. What torch's switches say about TF32 and cuDNN is one
setting for all of a process, and a training sets it as it is made: `under` gives each variant its own.
"""

import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gkl.data.memory import ImageData
from trainers.loop.training import Training

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("GKL_BENCHMARKS") or ROOT / "results" / "benchmarks")


class Arithmetic(NamedTuple):
    """torch's switches for float32 on a GPU."""

    matmul_tf32: bool = False
    cudnn_tf32: bool = True
    deterministic: bool = True
    benchmark: bool = False


AS_PUBLISHED = Arithmetic()  # torch's own, and cudnn.deterministic, which the authors' scripts set


def arithmetic() -> Arithmetic:
    """The switches as they are: after a training was made, the training's."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return Arithmetic(matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)


@contextmanager
def switched(wanted: Arithmetic) -> Iterator[None]:
    """Inside, the switches are as wanted; afterwards as they were."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def turn(to: Arithmetic) -> None:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = to

    before = arithmetic()
    turn(wanted)
    try:
        yield
    finally:
        turn(before)


def under(wanted: Arithmetic, call: Callable[[], object]) -> Callable[[], object]:
    """The call, with the switches as wanted."""

    def switched_call() -> object:
        with switched(wanted):
            return call()

    return switched_call


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, the device's own work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    at_least: float = 0.002,
    seconds: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call of each variant in each round. The variants take turns, and each round begins with another one.

    at_least: seconds that a measurement lasts; a variant faster than that is called several times. seconds: after so many no
    further round begins; the first is always whole.
    """
    began = time.perf_counter()
    for call in variants.values():
        for _ in range(3 if device.type == "cuda" else 1):  # whatever is done once; a CUDA graph is recorded
            call()
    repeats = {name: max(1, int(at_least / timed(call, device))) for name, call in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        if number and seconds is not None and time.perf_counter() - began > seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            call, n = variants[name], repeats[name]
            times[name].append(timed(lambda call=call, n=n: [call() for _ in range(n)], device) / n)
    if device.type == "cuda":  # a command that is cut short has told what it had measured
        medians = ", ".join(f"{name} {1000 * statistics.median(each):.3g} ms" for name, each in times.items())
        print(f"  [{time.perf_counter() - began:.0f} s] {medians}", file=sys.stderr, flush=True)
    return times


def ratios(times: Mapping[str, Sequence[float]], above: str, below: str) -> list[float]:
    """time(above) / time(below) of each round: a speed-up where `below` is ours."""
    return [a / b for a, b in zip(times[above], times[below], strict=True)]


@dataclass
class Row:
    """One ratio: what it compares, its value in each round, its target, and what was found equal in the same command."""

    what: str
    values: Sequence[float]
    at_most: float | None = None
    at_least: float | None = None
    equal: str = ""  # "parameters after two steps: 3e-16"
    more: dict[str, Any] = field(default_factory=dict)  # numbers that belong with it, for the file

    def quartiles(self) -> list[float]:
        """Lower quartile, median, upper quartile."""
        values = list(self.values)
        return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3

    def target(self) -> str:
        """The bound, as text."""
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return f"≥ {self.at_least:g}" if self.at_least is not None else ""

    def met(self) -> bool | None:
        """Whether the median keeps the bound; None without one."""
        middle = self.quartiles()[1]
        if self.at_most is not None:
            return middle <= self.at_most
        return middle >= self.at_least if self.at_least is not None else None


def explained(row: Row, ours: Callable[[], object], device: torch.device) -> Row:
    """The row; where it misses its target, with what a call of ours spends its time in: operators, or a card's kernels."""
    if row.met() is False:
        on_card = device.type == "cuda"
        ours()
        with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as seen:
            ours()
            synchronize(device)
        spent: dict[str, float] = {}
        for event in seen.key_averages():
            if on_card == (event.device_type == DeviceType.CUDA):
                name = shortened(event.key)
                time_spent = event.self_device_time_total if on_card else event.self_cpu_time_total
                spent[name] = spent.get(name, 0.0) + time_spent
        largest = sorted(spent.items(), key=lambda item: -item[1])[:5]
        total = sum(spent.values()) or 1.0
        shares = ", ".join(f"{key} {100 * time / total:.0f} %" for key, time in largest)
        if on_card:
            spans = kernels(seen)
            end = max((end for _, end in spans), default=0.0)
            whole = end - min((start for start, _ in spans), default=0.0)
            row.more["profile"] = (
                f"{shares}; {len(spans)} kernels, working {100 * covered(spans) / (whole or 1):.0f} % of the time"
            )
        else:
            calls = sum(event.count for event in seen.key_averages() if event.key.startswith("aten::"))
            row.more["profile"] = f"{shares}; {calls} operator calls"
    return row


def shortened(name: str) -> str:
    """An operator's or kernel's name without namespaces, templates and arguments."""
    name = re.sub(r"\(anonymous namespace\)", "", name.removeprefix("aten::").removeprefix("void "))
    while (inner := re.sub(r"<[^<>]*>", "", name)) != name:
        name = inner
    return name.split("(")[0].split("<")[0].split("::")[-1][:48]


def kernels(seen: profile) -> list[tuple[float, float]]:
    """Begin and end, in microseconds, of all that a card did while it was looked at."""
    events = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
    return [(event.time_range.start, event.time_range.end) for event in events]


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def busy(call: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    """Percent of the time in which the card works: with a kernel running, as profiled, of calls' time as it is without profiler."""

    def several() -> None:
        for _ in range(calls):
            call()

    several()
    seconds = min(timed(several, device) for _ in range(3))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        several()
        synchronize(device)
    return 100.0 * covered(kernels(seen)) / 1e6 / seconds


def peak_gib(call: Callable[[], object], device: torch.device, calls: int = 2) -> float:
    """Peak of memory of some calls, GiB, all that lies on the device included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(calls):
        call()
    synchronize(device)
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def recorded(task: Training) -> bool:
    """Whether its steps are replayed: what cannot be recorded runs step by step after a warning."""
    return task.replayed is not None and not task.replayed.failed


def spread(processes: int, measured: Callable[[], list[Row]]) -> list[Row]:
    """The rows that so many processes measure, one after the other, each running this command anew; the rounds of all together.

    Where a process's memory happens to lie moves a ratio by up to a half, and all its rounds alike; on a CPU, so that on a GPU
    one process, this one, is enough.
    """
    if processes == 1:
        return measured()
    child = "BENCHMARK_ROWS"  # the file that such a process leaves its rows in
    if child in os.environ:
        Path(os.environ[child]).write_text(json.dumps([vars(row) for row in measured()]))
        raise SystemExit
    each = []
    for number in range(processes):
        with tempfile.NamedTemporaryFile() as file:
            subprocess.run([sys.executable, *sys.argv], env=os.environ | {child: file.name}, check=True)
            each.append(json.loads(Path(file.name).read_text()))
        print(f"process {number + 1} of {processes} done", flush=True)
    rows = []
    for same in zip(*each, strict=True):
        profiles = [row["more"].pop("profile") for row in same if "profile" in row["more"]]
        row = Row(**{**same[0], "values": [ratio for row in same for ratio in row["values"]]})
        if row.met() is False:
            row.more["profile"] = (
                profiles[0] if profiles else "missed by the rounds of all processes together, in none alone"
            )
        rows.append(row)
    return rows


def report(name: str, heading: str, rows: Sequence[Row], device: torch.device) -> None:
    """Print the rows and write them with machine and versions. heading: what the ratios are."""
    here = machine(device)
    print(f"{heading}\n{here['name']}, {here['threads']} threads, torch {here['torch']}; median [quartiles]")
    for row in rows:
        low, middle, high = row.quartiles()
        verdict = {True: "met", False: "MISSED", None: ""}[row.met()]
        bound = f"  target {row.target()}: {verdict}" if row.target() else ""
        print(
            f"  {row.what:52} {middle:7.3f} [{low:.3f}, {high:.3f}]{bound}  {row.equal}".rstrip(), flush=True
        )
        if "profile" in row.more:
            print(f"      ours: {row.more['profile']}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    kind = "cpu" if device.type == "cpu" else here["name"].lower().replace(" ", "-")
    content = {
        "benchmark": name, "heading": heading, "machine": here, "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "rows": [
            {"what": row.what, "ratio": [round(x, 4) for x in row.quartiles()], "rounds": len(row.values), "target": row.target(),
             "met": row.met(), "equal": row.equal, **row.more}
            for row in rows
        ],
    }  # fmt: skip
    (RESULTS / f"{name}-{kind}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What a ratio was measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or "CPU"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return {
        "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "timm": version("timm"), "pyautoattack": version("pyautoattack"), "commit": commit.stdout.strip()[:9],
        **(card(device) if device.type == "cuda" else {}),
    }  # fmt: skip


def card(device: torch.device) -> dict[str, Any]:
    """What else there is to say of a GPU: memory in GiB as torch sees it, driver, Triton."""
    seen = torch.cuda.get_device_properties(device)
    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    ).stdout if shutil.which("nvidia-smi") else ""  # fmt: skip
    return {
        "capability": [seen.major, seen.minor], "memory": round(seen.total_memory / 2**30, 1), "driver": (told.split() or ["unknown"])[0],
        "triton": version("triton") if find_spec("triton") else None,
    }  # fmt: skip


def noise() -> ImageData:
    """256 random pictures of 32x32 in 100 classes: a step's time does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (256,), generator=generator)
    return ImageData("noise", 100, pictures, labels, pictures, labels, tuple(map(str, range(100))))
