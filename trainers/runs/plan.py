"""Which runs a table or figure needs, which of them are done, and what the missing ones cost."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainers.errors import ConfigError
from trainers.runs.compose import compose
from trainers.runs.cost import ASSUMED, SIZES, Rate, Uncounted, disk_bytes, needed_flops
from trainers.runs.identity import assessed_with
from trainers.runs.paths import record_path, run_folder, with_records
from trainers.runs.records import (
    assessment_path,
    is_whole,
    read_assessment,
    read_record,
    validate_assessment,
)
from trainers.runs.targets import CONFIGS, as_typed, instantiate, unknown
from trainers.runs.teacher import prerequisites, sources

Overrides = Mapping[str, Any]  # dotted setting -> value
STATES = ("done", "failed", "started", "missing")
SEEDS = {"paper": [0, 1, 2], "small": [0, 1, 2], "smoke": [0]}
# What the paper has and nobody can ask for here, by the number that a person types.
ABSENT = {
    "table": {
        "9": "Table IX is the heading of Tables X to XII: make table10, table11 or table12",
    },
    "figure": {},
}


@dataclass(frozen=True)
class Cell:
    """One run of a table or figure: a row and a seed, and the assessment its configuration may name."""

    row: str
    config: dict[str, Any]

    @cached_property
    def record(self) -> Path:
        """Where the file that completes it is or will be."""
        return assessment_path(self.run_record, self.assessment) if self.assessment else self.run_record

    @cached_property
    def run_record(self) -> Path:
        """Where the run's own record is or will be."""
        return record_path(self.config)

    @property
    def assessment(self) -> str | None:
        """What is measured on the run's weights beside the record's own metrics."""
        return self.config["assessment"]["name"] if self.config.get("assessment") else None

    @property
    def recorded(self) -> bool:
        """Whether the run itself has its record."""
        return is_whole(self.run_record)

    @property
    def trained(self) -> bool:
        """Whether its training is over, its own or that of a run that differs in the evaluation alone."""
        return self.recorded or (run_folder(self.config).path / f"{self.config['evaluate']}.pt").exists()

    @cached_property
    def before(self) -> "list[Cell]":
        """The runs that must be done before: a student's teacher, what a run begins with."""
        return [Cell(key, made) for key, made in prerequisites(self.config).items()]

    @property
    def stale(self) -> str | None:
        """What a finished run was made with and is another now: the weights of a run before, or what its assessment was asked for.

        None where it is not known to be.
        """
        return self._begun_with_others() or self._assessed_otherwise()

    def _assessed_otherwise(self) -> str | None:
        if not (self.assessment and is_whole(self.record, validate_assessment)):
            return None
        made, now = read_assessment(self.record)["settings"], assessed_with(self.config)
        for name in sorted(made.keys() & now.keys()):
            if made[name] != now[name] and None not in (made[name], now[name]):
                return (
                    f"{self.record} was measured with assessment.{name}={as_typed(made[name])}, and {as_typed(now[name])} is asked for; move it "
                    "away to measure anew"
                )
        return None

    def _begun_with_others(self) -> str | None:
        record = read_record(self.run_record) if self.recorded else {}
        for key in sources(self.config):
            made = record.get(key)
            now = instantiate(with_records(self.config)[key]).sha256 if made else None
            if made and now and made["sha256"] != now:
                return (
                    f"the run of {self.run_record} began with the {key}'s weights {made['sha256'][:12]}, and these are {now[:12]} now; "
                    f"move the record away to run anew, or bring the {key}'s weights back"
                )
        return None

    @property
    def status(self) -> str:
        """done, failed, started (there is a checkpoint) or missing."""
        if self.recorded and self.assessment:
            return "done" if is_whole(self.record, validate_assessment) else "started"
        if self.recorded:
            return str(read_record(self.record)["status"])
        return "started" if (run_folder(self.config).path / "checkpoints").exists() else "missing"


def tables(kind: str = "table") -> dict[str, Path]:
    """The tables (or figures) that can be made, by what a person types: "3" -> configs/table/table03.yaml, "1kd" -> table01kd."""
    return {p.stem.removeprefix(kind).lstrip("0"): p for p in sorted((CONFIGS / kind).glob(f"{kind}*.yaml"))}


def load_table(number: str, kind: str = "table") -> dict[str, Any]:
    """The configuration of a table or figure. Raises ConfigError for one that does not exist."""
    known = tables(kind)
    if reason := ABSENT[kind].get(str(number)):
        raise ConfigError(f"{reason}; there are: {', '.join(known)}")
    if str(number) not in known:
        raise ConfigError(unknown(kind, str(number), list(known)))
    path = known[str(number)]
    table = _read(path)
    if "rows_of" in table:
        source = load_table(table.pop("rows_of").removeprefix("table").lstrip("0"))
        table = {**{key: source[key] for key in ("labels", "metrics", "rows")}, **table}
    return table | {"name": path.stem}


def _read(path: Path) -> dict[str, Any]:
    return copy.deepcopy(_read_once(path))


@cache
def _read_once(path: Path) -> dict[str, Any]:
    """A table's file; every other table asks for its rows, too."""
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def experiments(config: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    """Column -> experiment of a row: one under "" in a table without columns, none for a row that is not run."""
    if "columns" not in config:
        return {"": row["experiment"]} if row["experiment"] else {}
    if "experiments" in row:
        return dict(row["experiments"])
    return {column: f"{row['experiment']}/{column}" for column in config["columns"]}


def row_config(
    row: Mapping[str, Any],
    scale: str,
    protocol: str,
    overrides: Sequence[str] = (),
    assessment: str | None = None,
) -> dict[str, Any]:
    """The configuration of a row's run at a scale, seed 0: its experiment, its own overrides, then the person's."""
    own = [f"{key}={json.dumps(value)}" for key, value in (row.get("overrides") or {}).items()]
    asked = [f"assessment={assessment}"] if assessment else []
    names = [f"experiment={row['experiment']}", f"scale={scale}", f"protocol={protocol}"]
    return compose("train", [*names, *asked, *own, *overrides])


def cells(
    table: Mapping[str, Any],
    *,
    scale: str,
    protocol: str,
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """Every run the chosen rows and columns need, each once, teachers first. Raises ConfigError for an unknown row or column."""
    for word in overrides:
        if (key := word.partition("=")[0].lstrip("+~")) in ("seed", "experiment"):
            instead = (
                "seeds=[0,1] (SEEDS=0,1)"
                if key == "seed"
                else "rows=[...] (ROWS=...), whose experiments these are"
            )
            raise ConfigError(f"{word} would stand for every run of {table['name']}; choose by {instead}")
    runnable = {row["id"]: row for row in table["rows"] if experiments(table, row)}
    for kind, chosen, known in (("row", rows, runnable), ("column", columns, table.get("columns", {}))):
        for name in chosen or ():
            if name not in known:
                raise ConfigError(unknown(f"{kind} of {table['name']}", name, list(known)))
    found: dict[Path, Cell] = {}
    for row in rows or runnable:
        for column, experiment in experiments(table, runnable[row]).items():
            if columns and column not in columns:
                continue
            named = {**runnable[row], "experiment": experiment}
            config = row_config(named, scale, protocol, overrides, table.get("assessment"))
            for seed in seeds if seeds is not None else SEEDS[scale]:
                cell = Cell(row, {**config, "seed": seed})
                found.setdefault(cell.record, cell)
    before: dict[Path, Cell] = {}
    layer = [one for cell in found.values() for one in cell.before]
    while fresh := {cell.record: cell for cell in layer}:
        before = {
            **fresh,
            **{k: cell for k, cell in before.items() if k not in fresh},
        }  # what these need comes first
        layer = [one for cell in fresh.values() for one in cell.before]
    return [*({k: found.get(k, cell) for k, cell in before.items()} | found).values()]


def claims() -> dict[str, list[Overrides]]:
    """For each experiment, the overrides of every row of every table and figure."""
    return _claims((*tables("table").values(), *tables("figure").values()))


@cache
def _claims(paths: tuple[Path, ...]) -> dict[str, list[Overrides]]:
    """claims, once for all sections of all tables."""
    found: dict[str, list[Overrides]] = {}
    for path in paths:
        kind = path.parent.name
        table = load_table(path.stem.removeprefix(kind).lstrip("0"), kind)
        for row in table["rows"]:
            for experiment in experiments(table, row).values():
                found.setdefault(experiment, []).append(row.get("overrides") or {})
    return found


def summary(title: str, scale: str, plan: Sequence[Cell], rate: Rate = ASSUMED) -> str:
    """Lines for a person: each row's runs by state, and what the missing ones cost at a rate."""
    states = [cell.status for cell in plan]
    lines = [f"{title}, scale={scale}: {states.count('done')} of {len(plan)} runs done"]
    total: float | None = 0.0
    for row in dict.fromkeys(cell.row for cell in plan):
        mine = [(cell, state) for cell, state in zip(plan, states, strict=True) if cell.row == row]
        names = sorted({cell.config["experiment"] for cell, _ in mine})
        seeds = {state: [cell.config["seed"] for cell, s in mine if s == state] for state in STATES}
        name = names[0] if len(names) == 1 else f"{os.path.commonpath(names)}/... ({len(names)} of them)"
        line = f"  {row:16} {name:22} " + ", ".join(
            f"{state}: seed {' '.join(map(str, some))}" if len(names) == 1 else f"{state}: {len(some)} runs"
            for state, some in seeds.items()
            if some
        )
        if left := [cell for cell, state in mine if state != "done"]:
            hours = [device_hours(cell, rate) for cell in left]
            mean = None if None in hours else sum(h for h in hours if h is not None) / len(hours)
            total = None if mean is None or total is None else total + mean * len(left)
            each = "each" if len(names) == 1 else "each, on average,"
            line += f"; {each} {_hours(mean)}"
            with suppress(Uncounted):
                line += f", {disk_bytes(left[0].config) / 1e9:.1g} GB on disk"
        lines.append(line)
    if states.count("done") < len(plan):
        lines.append(f"  to do: {_hours(total)}, {rate}")
    return "\n".join(lines)


def device_hours(cell: Cell, rate: Rate = ASSUMED) -> float | None:
    """Hours of one device at a rate for what is missing of a cell; None for data whose size is not known beforehand, and for a network
    that cannot be counted."""
    size = SIZES.get(cell.config["data"]["_target_"].rpartition("/")[2])
    if size is None:
        return None
    attacks = len(cell.config["assessment"].get("eighths", ())) if cell.assessment else 0
    try:
        flops = needed_flops(
            cell.config, size, trained=cell.trained, recorded=cell.recorded, further_attacks=attacks
        )
    except Uncounted:
        return None
    return flops / rate.flops_an_hour


def _hours(hours: float | None) -> str:
    if hours is None:
        return "an unknown number of device-hours for this data or network"
    if hours < 0.01:
        return "under 0.01 device-hours"
    return f"about {hours:,.0f} device-hours" if hours >= 10 else f"about {hours:.2g} device-hours"
