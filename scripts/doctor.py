"""What this machine has and what each table still needs: versions, devices, disk, data, runs.

    python scripts/doctor.py

Changes nothing and downloads nothing. Exit code 0, or 2 when an installed version is not one that pyproject.toml takes.
"""

import trainers.interrupt  # noqa: F401

import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from gkl.data.generated import open_shards
from trainers.command import run_main
from trainers.errors import RunError
from trainers.reports.tables import place
from trainers.runs.compose import choices, compose
from trainers.runs.launchers.local import Local
from trainers.runs.paths import folders
from trainers.runs.plan import SEEDS, claims, experiments, load_table, tables
from trainers.runs.records import Record, read_records
from trainers.runs.targets import CONFIGS, instantiate


def main(arguments: list[str]) -> int:
    """Print the report. Returns the exit code."""
    wrong = report_versions()
    report_devices()
    report_folders()
    report_data()
    report_generated()
    report_renditions()
    report_teachers()
    report_tables()
    return 2 if wrong else 0


def report_versions() -> list[str]:
    """Installed versions against pyproject.toml's and the lock's; returns those that do not fit."""
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    groups = (
        project["dependencies"],
        *(extras[name] for name in ("models", "data", "evaluation", "reproduction", "clip")),
    )
    needed = dict.fromkeys(line for group in groups for line in group if not line.startswith("gkl["))
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    wrong = []
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for requirement in map(Requirement, needed):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        fits = found != "missing" and requirement.specifier.contains(found.split("+")[0], prereleases=True)
        pinned = f"{requirement.name}=={found.split('+')[0]}" in lock
        note = "" if pinned else "; not what requirements.lock has"
        print(
            f"  {'ok' if fits else 'BAD':3} {requirement.name} {found} (needs {requirement.specifier}{note})"
        )
        if not fits:
            wrong.append(requirement.name)
    return wrong


def report_devices() -> None:
    """GPUs or CPU cores, and how many runs a table starts at once."""
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        print(f"GPU {number}: {card.name}, {card.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print(
            f"no GPU that torch {torch.__version__} sees; {os.cpu_count()} CPU cores carry scale=smoke, and scale=small with patience"
        )
    print(f"a table starts {Local().concurrent_runs(1)} runs at a time (JOBS=...)")


def report_folders() -> None:
    """Where things go and the room there."""
    for name, folder in folders().items():
        path = Path(folder).resolve()
        existing = next(p for p in (path, *path.parents) if p.exists())
        state = "writable" if os.access(existing, os.W_OK) else "NOT WRITABLE"
        print(
            f"{name}: {folder} ({state}, {shutil.disk_usage(existing).free / 1e9:.0f} GB free); move it with GKL_{name.upper()}"
        )


def report_data() -> None:
    """Each data set that can be had without further settings, loaded and checked."""
    for name in choices("data"):
        if "/" in name or name in ("digits_files", "digits_captions"):
            continue  # what a scale takes; the digits, which it writes itself
        if name == "caption_files":
            print(f"data {name}: any pictures with captions by data.root=...")
            continue
        if name in ("image_folder", "image_files", "image_folder_few"):
            print(f"data {name}: any folder or zip of train/<class>/ and test/<class>/ by data.root=...")
            continue
        node = compose("train", ["experiment=at/c100_basic_gkl", f"data={name}"])["data"]
        try:
            data = instantiate({**node, "download": False} if "download" in node else node)
            print(f"data {name}: {len(data.train_labels)} train and {len(data.test_labels)} test images")
        except RunError as error:
            print(f"data {name}: {error}")


def report_generated() -> None:
    """Generated pictures that the experiments name."""
    for name in ("cifar10_20m", "cifar100_50m"):
        folder = Path(os.environ.get("GKL_DATA", "data")) / "generated" / name
        try:
            print(f"generated {name}: {len(open_shards(str(folder), 100)):,} pictures")
        except (FileNotFoundError, ValueError) as error:
            print(f"generated {name}: {error}")


def report_renditions() -> None:
    """The pictures of Table XIII beside ImageNet's own."""
    node = compose("train", ["experiment=kd/lt_kl/resnext101_resnet18", "assessment=renditions"])[
        "assessment"
    ]
    try:
        instantiate(node).check()
        print(f"ImageNet-R and ImageNet-Sketch: both in {node['root']}")
    except ValueError as error:
        print(f"Table XIII: {error}")


def report_teachers() -> None:
    """Published teachers that distillation can start from instead of training its own."""
    for data, pairs, experiment in (("CIFAR-100", "cifar100", "c100_kd"), ("ImageNet", "imagenet", "in_kd")):
        names = choices(f"pair/{pairs}")
        teacher = compose("train", [f"experiment=kd/{experiment}/{names[0]}"])["teacher"]
        rows = [OmegaConf.load(CONFIGS / "pair" / pairs / f"{name}.yaml") for name in names]
        nodes = [{**teacher, "weights": "published", "published": row.published} for row in rows]
        files = {instantiate(node).file for node in nodes}
        missing = sorted(file.name for file in files if not file.is_file())
        print(
            f"published teachers, {data}: {len(files) - len(missing)} of {len(files)} files in {teacher['folder']} "
            f"(move it with GKL_TEACHERS){'; missing: ' + ', '.join(missing) if missing and data == 'ImageNet' else ''}"
        )


def report_tables() -> None:
    """Of each table's rows, the runs that have records and all there are to be, at each scale."""
    records = read_records(Path(folders()["results"]) / "runs")
    for line in records.damaged:
        print(line)
    for number in tables():
        table = load_table(number)
        states = []
        for scale in choices("scale"):
            wanted = runs(table, scale)
            done = wanted & done_of(table, records, scale)
            states.append(f"{scale} {len(done)}/{len(wanted)} runs")
        print(f"table {number}: {', '.join(states)}")


Run = tuple[str, str, int]  # experiment, what it changes, seed


def runs(table: Mapping[str, Any], scale: str) -> set[Run]:
    """The runs of a table's rows, each once."""
    return {
        (experiment, _text(row), seed)
        for row in table["rows"]
        for experiment in experiments(table, row).values()
        for seed in SEEDS[scale]
    }


def done_of(table: Mapping[str, Any], records: Sequence[Record], scale: str) -> set[Run]:
    """The runs that the table shows in this scale's own setting.

    Not composed, which would take minutes: a recipe that has changed since a run was recorded is seen by its table's plan=true.
    """
    placed = place(table, records, scale=scale, protocol="official", claims=claims())
    needed = table.get("assessment")
    return {
        (record["experiment"], _text(row), record["seed"])
        for row in table["rows"]
        for record, setting in placed.get(row["id"], ())
        if not setting and (needed is None or needed in record["assessments"])
    }


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps(row.get("overrides") or {}, sort_keys=True)


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
