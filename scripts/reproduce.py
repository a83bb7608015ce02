"""Reproduce a table: list its runs, skip what is done, run what is missing, render it.

    python scripts/reproduce.py table=3 scale=smoke
    python scripts/reproduce.py table=3 plan=true                      # what is missing and what it costs
    python scripts/reproduce.py table=3 scale=small seeds=[0,1] rows=[gkl_basic,kl_basic] data=image_folder data.root=...

Settings that configs/reproduce.yaml does not know are handed to every run.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gkl.records import read_records
from trainers.command import run_main
from trainers.configuration import CONFIGS, ConfigError, check, check_machine, choices, unknown
from trainers.launch import default_jobs, run_all
from trainers.plan import TFLOPS, Cell, cells, disk_bytes, gpu_hours, load_table, tables
from trainers.render import render


def main(arguments: list[str]) -> int:
    """Plan, run, render. Returns the exit code."""
    settings, overrides = read_settings(arguments)
    table = load_table(settings["table"])
    plan = cells(
        table,
        scale=settings["scale"],
        protocol=settings["protocol"],
        seeds=settings["seeds"],
        rows=settings["rows"],
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
        jobs = default_jobs(missing[0].config["devices"]) if settings["jobs"] == "auto" else settings["jobs"]
        run_all(missing, jobs)
    results = Path(plan[0].config["paths"]["results"])
    for path in render(table, read_records(results / "runs"), results):
        print(f"wrote {path}")
        if path.suffix == ".md":
            print(path.read_text())
    return 0


def read_settings(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of configs/reproduce.yaml, checked, and the arguments left for the runs."""
    defaults = OmegaConf.load(
        CONFIGS / "reproduce.yaml"
    )  # plain values: Hydra would take `table` and `scale` for groups
    own = [a for a in arguments if a.split("=")[0] in set(defaults)]
    settings = OmegaConf.to_container(OmegaConf.merge(defaults, OmegaConf.from_dotlist(own)))
    assert isinstance(settings, dict)
    if settings["table"] == "???":
        raise ConfigError(f"table=... is missing; one of: {', '.join(tables())}")
    for group in ("scale", "protocol"):
        if settings[group] not in choices(group):
            raise ConfigError(unknown(group, str(settings[group]), choices(group)))
    for name, kind, example in (("seeds", int, "0,1"), ("rows", str, "kl_basic,gkl_basic")):
        given = settings[name]
        if given is not None and not (
            isinstance(given, list) and given and all(type(x) is kind for x in given)
        ):
            raise ConfigError(f"{name} must be a list such as {name}=[{example}], got {given!r}")
    if type(settings["plan"]) is not bool:
        raise ConfigError(f"plan must be true or false, got {settings['plan']!r}")
    if settings["jobs"] != "auto" and not (type(settings["jobs"]) is int and settings["jobs"] > 0):
        raise ConfigError(f"jobs must be auto or a number above 0, got {settings['jobs']!r}")
    return {str(key): value for key, value in settings.items()}, [a for a in arguments if a not in own]


def print_plan(table: dict[str, object], scale: str, plan: list[Cell]) -> None:
    """The runs with their state, and what is left to pay for."""
    print(
        f"{table['title']}, scale={scale}: {sum(c.status == 'done' for c in plan)} of {len(plan)} runs done"
    )
    total = 0.0
    for cell in plan:
        hours = gpu_hours(cell.config)
        cost = (
            ""
            if cell.status == "done"
            else f"  {_hours(hours)}, {disk_bytes(cell.config) / 1e9:.2g} GB on disk"
        )
        total += 0.0 if cell.status == "done" else hours or 0.0
        print(
            f"  {cell.status:8} {cell.row:16} seed {cell.config['seed']}  {cell.config['experiment']}{cost}"
        )
    if any(c.status != "done" for c in plan):
        print(f"  missing: {_hours(total)}, assuming {TFLOPS:g} TFLOP/s sustained by a card", flush=True)


def _hours(hours: float | None) -> str:
    if hours is None:
        return "cost unknown for this data"
    return (
        "under 0.01 GPU-hours"
        if hours < 0.01
        else f"about {hours:,.0f} GPU-hours"
        if hours >= 10
        else f"about {hours:.2g} GPU-hours"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
