"""What the benchmarks share: the clock, turns, pictures of CIFAR-100's shape, and the file a result goes to.

    times = interleaved({"ours": step, "theirs": other}, device, rounds=15)
    row = Row("WRN-16-2, K = 5", ratios(times, "theirs", "ours"), at_least=1.5)
    report("step", [explained(row, step, device)], device)

`report` prints each ratio beside its target and writes results/benchmarks/<name>-<cpu or card>.json, from which table.py makes the
table of the docs.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gkl.data import ImageData

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, the device's own work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, at_least: float = 0.002
) -> dict[str, list[float]]:
    """Seconds of one call of each variant in each round. The variants take turns, and each round begins with another one.

    at_least: seconds that a measurement lasts; a variant faster than that is called several times.
    """
    for call in variants.values():
        call()  # once for whatever is done once
    repeats = {name: max(1, int(at_least / timed(call, device))) for name, call in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            call, n = variants[name], repeats[name]
            times[name].append(timed(lambda call=call, n=n: [call() for _ in range(n)], device) / n)
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
    """The row; where it misses its target, with the operators in which a call of ours spends its time."""
    if row.met() is False:
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        ours()
        with profile(activities=kinds) as seen:
            ours()
        on_card = device.type == "cuda"
        spent = {
            event.key.removeprefix("aten::"): event.self_device_time_total
            if on_card
            else event.self_cpu_time_total
            for event in seen.key_averages()
        }
        largest = sorted(spent.items(), key=lambda item: -item[1])[:5]
        calls = sum(event.count for event in seen.key_averages() if event.key.startswith("aten::"))
        shares = ", ".join(f"{key} {100 * time / sum(spent.values()):.0f} %" for key, time in largest)
        row.more["profile"] = f"{shares}; {calls} operator calls"
    return row


def spread(processes: int, measured: Callable[[], list[Row]]) -> list[Row]:
    """The rows that so many processes measure, one after the other, each running this command anew; the rounds of all together.

    Where a process's memory happens to lie moves a ratio by up to a half, and all its rounds alike.
    """
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
            row.more["profile"] = profiles[0]
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
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parents[1]
    )
    return {
        "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "timm": version("timm"), "pyautoattack": version("pyautoattack"), "commit": commit.stdout.strip()[:9],
        **({"capability": torch.cuda.get_device_capability(device)} if device.type == "cuda" else {}),
    }  # fmt: skip


def noise() -> ImageData:
    """256 random pictures of 32x32 in 100 classes: a step's time does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (256,), generator=generator)
    return ImageData("noise", 100, pictures, labels, pictures, labels, tuple(map(str, range(100))))
