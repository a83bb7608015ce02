"""What a person asks of many runs at once: a table, a figure or a sweep; settings read, runs planned, missing ones run."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from trainers.errors import ConfigError
from trainers.runs.compose import choices
from trainers.runs.cost import ASSUMED, Rate, measured_rate
from trainers.runs.identity import differences
from trainers.runs.launch import run_all
from trainers.runs.paths import check_sources, processes
from trainers.runs.plan import Cell, row_config, summary
from trainers.runs.provenance import machine_name
from trainers.runs.records import read_records
from trainers.runs.settings import check
from trainers.runs.targets import CONFIGS, instantiate, unknown


def read_settings(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of configs/reproduce.yaml, checked, and the arguments left for the runs. Raises ConfigError."""
    defaults = OmegaConf.load(
        CONFIGS / "reproduce.yaml"
    )  # plain values: Hydra would take `table` and `scale` for groups
    own = [a for a in arguments if a.split("=")[0] in set(defaults)]
    settings = OmegaConf.to_container(OmegaConf.merge(defaults, OmegaConf.from_dotlist(own)))
    assert isinstance(settings, dict)
    for group in ("scale", "protocol"):
        if settings[group] not in choices(group):
            raise ConfigError(unknown(group, str(settings[group]), choices(group)))
    examples = (("seeds", int, "0,1"), ("rows", str, "kl_basic,gkl_basic"), ("columns", str, "vgg13_vgg8"))
    for name, kind, example in examples:
        given = settings[name]
        if given is not None and not (
            isinstance(given, list) and given and all(type(x) is kind for x in given)
        ):
            raise ConfigError(f"{name} must be a list such as {name}=[{example}], got {given!r}")
    for name in ("plan", "keep_going"):
        if type(settings[name]) is not bool:
            raise ConfigError(f"{name} must be true or false, got {settings[name]!r}")
    if settings["jobs"] != "auto" and not (type(settings["jobs"]) is int and settings["jobs"] > 0):
        raise ConfigError(f"jobs must be auto or a number above 0, got {settings['jobs']!r}")
    for name in ("tflops", "minutes"):
        if (given := settings[name]) is not None and (type(given) not in (int, float) or given <= 0):
            raise ConfigError(f"{name} must be a number above 0, got {given!r}")
    if settings["trials"] is not None and not (type(settings["trials"]) is int and settings["trials"] > 0):
        raise ConfigError(f"trials must be a number above 0, got {settings['trials']!r}")
    return {str(key): value for key, value in settings.items()}, [a for a in arguments if a not in own]


def carry_out(
    table: Mapping[str, Any],
    plan: Sequence[Cell],
    settings: Mapping[str, Any],
    then: Callable[[Cell], Sequence[Cell]] = lambda done: (),
) -> list[str] | None:
    """Say what is done and missing; unless only the plan is wanted, check and run what is missing.

    then: further runs after each, see run_all. Returns a line for each run that failed (with keep_going; otherwise the first
    raises), or None when only planned.
    """
    missing = [cell for cell in plan if cell.status != "done"]
    for cell in missing:
        check(cell.config, processes(cell.config))
    sustained = rate(plan, settings) if missing else ASSUMED
    print(summary(table["title"], settings["scale"], plan, sustained), flush=True)
    stale = [line for cell in plan if (line := cell.stale)]
    if settings["plan"]:
        for line in stale:
            print(f"warning: {line}", file=sys.stderr)
        return None
    if stale:
        raise ConfigError(stale[0])

    def ready(cell: Cell) -> Cell:
        check(cell.config, processes(cell.config))
        check_sources(cell.config, published=True)  # a run of ours is in the plan
        cell.config["logger"] = {**cell.config["logger"], "table": table["name"], "row": cell.row}
        return cell

    if not missing:
        return []
    missing = [ready(cell) for cell in missing]
    launcher = instantiate(missing[0].config["launcher"])
    launcher.check(missing[0].config)
    return run_all(
        missing,
        launcher,
        concurrent_runs(missing[0].config, settings),
        keep_going=settings["keep_going"],
        minutes=settings["minutes"],
        then=lambda done: [ready(cell) for cell in then(done)],
    )


def rate(plan: Sequence[Cell], settings: Mapping[str, Any]) -> Rate:
    """What a device is taken to sustain: as the person says, as recorded for such runs on such a device, or as assumed."""
    if settings["tflops"] is not None:
        return Rate(float(settings["tflops"]))
    config = plan[-1].config
    recorded = dict.fromkeys((Path(config["paths"]["results"]).resolve(), CONFIGS.parent / "results"))
    task = config["experiment"].split("/")[0]
    records = [record for folder in recorded for record in read_records(folder / "runs" / task)]
    return measured_rate(records, machine_of(config), settings["scale"], task) or ASSUMED


def machine_of(config: Mapping[str, Any]) -> str:
    """What a run's record calls the device that it would run on here."""
    on_gpu = torch.cuda.is_available() and config["device"] != "cpu"
    return machine_name(torch.device("cuda" if on_gpu else "cpu"))


def concurrent_runs(config: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """How many runs go at the same time."""
    return int(
        instantiate(config["launcher"]).concurrent_runs(config["devices"])
        if settings["jobs"] == "auto"
        else settings["jobs"]
    )


def damaged(plan: Sequence[Cell]) -> list[str]:
    """A line for each record of a plan that is there and cannot be read; its run counts as missing."""
    unread = [cell.record for cell in plan if cell.status != "done" and cell.record.exists()]
    return [f"record {path} is damaged; it counts as missing" for path in unread]


def ended(failures: Sequence[str]) -> int:
    """The exit code of a table, figure or sweep, after telling what failed."""
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return 2 if failures else 0


def setting_of(rows: Sequence[Mapping[str, Any]], plan: Sequence[Cell]) -> dict[str, Any]:
    """What the person's own overrides change in the runs of a plan, as the section of a table that shows them."""
    cell = plan[-1]  # teachers, which may be other tables' runs, come first
    row = {**next(row for row in rows if row["id"] == cell.row), "experiment": cell.config["experiment"]}
    base = row_config(row, cell.config["scale"], cell.config["protocol"])
    return {key: change[1] for key, change in differences(base, cell.config).items()}
