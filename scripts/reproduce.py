"""Reproduce a table: list its runs, skip what is done, run what is missing, render it.

    python scripts/reproduce.py table=3 scale=smoke
    python scripts/reproduce.py table=3 plan=true                      # what is missing and what it costs
    python scripts/reproduce.py table=3 scale=small seeds=[0,1] rows=[gkl_basic,kl_basic] data=image_folder data.root=...

Settings that configs/reproduce.yaml does not know are handed to every run.
"""

import re
import sys
from pathlib import Path

from omegaconf import OmegaConf

from gkl.records import read_records
from trainers.command import run_main
from trainers.configuration import CONFIGS, ConfigError, check, check_machine, choices, compose, unknown
from trainers.launch import default_jobs, run_all
from trainers.plan import TFLOPS, Cell, cells, disk_bytes, gpu_hours, load_table
from trainers.render import render


def main(arguments: list[str]) -> int:
    """Plan, run, render. Returns the exit code."""
    own = set(OmegaConf.load(CONFIGS / "reproduce.yaml"))
    settings = compose("reproduce", [a for a in arguments if re.split("[=.]", a)[0] in own])
    overrides = [a for a in arguments if re.split("[=.]", a)[0] not in own]
    for group in ("scale", "protocol"):
        if settings[group] not in choices(group):
            raise ConfigError(unknown(group, settings[group], choices(group)))
    for name, kind in (("seeds", int), ("rows", str)):
        given = settings[name]
        if given is not None and not (isinstance(given, list) and given and all(type(x) is kind for x in given)):
            raise ConfigError(f"{name} must be a list such as {name}=[{'0,1' if kind is int else 'gkl_basic'}], got {given!r}")
    table = load_table(settings["table"])
    plan = cells(
        table, scale=settings["scale"], protocol=settings["protocol"], seeds=settings["seeds"], rows=settings["rows"],
        overrides=overrides,
    )
    missing = [cell for cell in plan if cell.status != "done"]
    print_plan(table, settings["scale"], plan)
    if settings["plan"]:
        return 0
    for cell in missing:
        check(cell.config, cell.config["devices"])
    if missing:
        check_machine(missing[0].config)
        jobs = default_jobs(missing[0].config["devices"]) if settings["jobs"] == "auto" else int(settings["jobs"])
        run_all(missing, jobs)
    results = Path(plan[0].config["paths"]["results"])
    for path in render(table, read_records(results / "runs"), results):
        print(f"wrote {path}")
        if path.suffix == ".md":
            print(path.read_text())
    return 0


def print_plan(table: dict[str, object], scale: str, plan: list[Cell]) -> None:
    """The runs with their state, and what is left to pay for."""
    print(f"{table['title']}, scale={scale}: {sum(c.status == 'done' for c in plan)} of {len(plan)} runs done")
    total = 0.0
    for cell in plan:
        hours = gpu_hours(cell.config)
        cost = "" if cell.status == "done" else f"  {_hours(hours)}, {disk_bytes(cell.config) / 1e9:.2g} GB on disk"
        total += 0.0 if cell.status == "done" else hours or 0.0
        print(f"  {cell.status:8} {cell.row:16} seed {cell.config['seed']}  {cell.config['experiment']}{cost}")
    if any(c.status != "done" for c in plan):
        print(f"  missing: about {total:.2g} GPU-hours, assuming {TFLOPS:g} TFLOP/s sustained by a card", flush=True)


def _hours(hours: float | None) -> str:
    return "cost unknown for this data" if hours is None else f"about {hours:.2g} GPU-hours"


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
