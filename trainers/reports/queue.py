"""The missing runs that would say most about the paper's claims for the minutes they take.

steps, unfit = queue(records, settings, overrides)
print(*steps, sep="\n")

A step is a seed of both sides of a claim, with the runs that it lacks. It is worth the share that it brings of the seeds that its line
still needs: those that would decide it, and at least FIRST, below which a spread says little. Steps that lack the same runs are one, and
worth their sum; what an earlier step brings, a teacher say, costs a later one nothing.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainers.errors import ConfigError
from trainers.loop.console import duration
from trainers.reports.ledger import MOST, Line, ledger, place_of, seeds_needed
from trainers.runs.cost import Rate
from trainers.runs.identity import config_hash
from trainers.runs.plan import Cell, cells, device_hours, experiments, load_table
from trainers.runs.records import Record
from trainers.runs.reproduce import machine_of, rate

FIRST = 5  # paired seeds
OFFERED = 10  # seeds of a pair at a time


@dataclass(frozen=True)
class Step:
    """The runs that a seed of some claims' pairs lacks. minutes: None for data whose size is not known beforehand."""

    claims: Sequence[str]
    pair: str
    seed: int
    cells: Sequence[Cell]
    minutes: float | None
    worth: float

    def __str__(self) -> str:
        time = "unknown time" if self.minutes is None else f"about {duration(60 * self.minutes)}"
        runs = f"{len(self.cells)} run{'s' * (len(self.cells) > 1)}"
        return f"{self.pair}, seed {self.seed}: {runs}, {time}; {100 * self.worth:.0f} % of what {', '.join(self.claims)} need"


def missing_seeds(line: Line) -> int:
    """How many more a line needs."""
    n = len(line.differences)
    wanted = FIRST
    if n > 1 and line.verdict.startswith("undecided"):
        found = seeds_needed(line.mean, statistics.stdev(line.differences))
        wanted = max(FIRST, found or MOST)
    return max(wanted - n, 0)


def queue(
    records: Sequence[Record], settings: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[list[Step], list[str]]:
    """Every step at the settings' scale and protocol, the most telling a minute first; and a line for each pair that cannot be
    so configured: overrides of adversarial training say nothing of distillation. Raises ConfigError where none can."""
    offered: dict[frozenset[Path], Step] = {}
    results, unfit, configured = list[Path](), list[str](), False
    for claim in ledger(records):
        for pair in claim.pairs:
            try:
                runs = _runs(pair, settings, overrides)
            except ConfigError as error:
                if not overrides:
                    raise
                unfit.append(f"{' '.join(place_of(pair))}, {pair['ours']} against {pair['other']}: {error}")
                continue
            configured = True
            for name, by_seed in runs.items():
                results = results or [
                    Path(next(iter(by_seed.values()))[0].config["paths"]["results"]) / "runs"
                ]
                mine = {str(c.record.relative_to(results[0])) for some in by_seed.values() for c in some}
                lines = [line for line in claim.lines if mine & set(line.records)]
                left = [missing_seeds(line) for line in lines] or [FIRST]
                worth = statistics.mean(1 / n if n else 0.0 for n in left)
                lacking = [(seed, _lacking(some)) for seed, some in by_seed.items()]
                for seed, some in [one for one in lacking if one[1]][: min(OFFERED, max(left))]:
                    key = frozenset(cell.record for cell in some)
                    before = offered.get(key)
                    names = [*(before.claims if before else ()), claim.name]
                    offered[key] = Step(
                        list(dict.fromkeys(names)),
                        name,
                        seed,
                        some,
                        None,
                        worth + (before.worth if before else 0.0),
                    )
    if unfit and not configured:
        raise ConfigError(f"no claim's runs can be so configured: {unfit[0]}")
    return _ordered(list(offered.values()), records, settings), unfit


def _runs(
    pair: Mapping[str, Any], settings: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, dict[int, list[Cell]]]:
    """Name of a pair -> seed -> its two runs: one pair, or in a table with columns one a column that both rows have."""
    kind, number = place_of(pair)
    table = load_table(number, kind)
    rows = {
        row["id"]: experiments(table, row)
        for row in table["rows"]
        if row["id"] in (pair["ours"], pair["other"])
    }
    both = [column for column in rows[pair["ours"]] if column in rows[pair["other"]]]
    if "columns" in table and "metrics" in pair:
        both = [column for column in both if column in pair["metrics"]]
    seeds = range(OFFERED * 2)
    found = {}
    for column in both:
        plan = cells(
            table, scale=settings["scale"], protocol=settings["protocol"], seeds=seeds, rows=list(rows),
            columns=[column] if column else None, overrides=overrides,
        )  # fmt: skip
        sides = [cell for cell in plan if cell.row in rows]
        name = f"{table['title'].split(':')[0]}, {pair['ours']} against {pair['other']}{column and f' of {column}'}"
        found[name] = {seed: [cell for cell in sides if cell.config["seed"] == seed] for seed in seeds}
    return found


def _lacking(some: Sequence[Cell]) -> list[Cell]:
    """Those that are not done, after the teachers that they wait for."""
    found: dict[Path, Cell] = {}
    for cell in some:
        if cell.status != "done":
            for one in [*_lacking(cell.before), cell]:
                found.setdefault(one.record, one)
    return list(found.values())


def _ordered(offered: list[Step], records: Sequence[Record], settings: Mapping[str, Any]) -> list[Step]:
    """By worth a minute; a run that a step before brings costs nothing. Those of unknown time come last."""
    rates: dict[str, Rate] = {}
    took: dict[Path, float | None] = {}
    for step in offered:
        for cell in step.cells:
            task = cell.config["experiment"].split("/")[0]
            if task not in rates:
                rates[task] = rate([cell], settings)
            if cell.record not in took:
                took[cell.record] = _minutes(cell, records, rates[task])
    found: list[Step] = []
    brought: set[Path] = set()

    def costing(step: Step) -> Step:
        left = [cell for cell in step.cells if cell.record not in brought]
        each = [took[cell.record] for cell in left]
        minutes = None if None in each else sum(m for m in each if m is not None)
        return Step(step.claims, step.pair, step.seed, left, minutes, step.worth)

    offered = [step for step in offered if step.worth > 0]
    while offered:
        priced = [costing(step) for step in offered]
        best = priced[max(range(len(priced)), key=lambda i: _rank(priced[i]))]
        brought |= {cell.record for cell in best.cells}
        freed = [step for step in offered if all(cell.record in brought for cell in step.cells)]
        offered = [step for step in offered if step not in freed]
        # What the same runs decide beside it, the other side having come before, is its worth, too.
        names = dict.fromkeys(name for step in freed for name in step.claims)
        worth = sum(step.worth for step in freed)
        found.append(replace(best, claims=list(names), worth=worth))
    return found


def _rank(step: Step) -> tuple[bool, float]:
    return step.minutes is not None, step.worth / max(step.minutes or 1.0, 1e-3)


def _minutes(cell: Cell, records: Sequence[Record], sustained: Rate) -> float | None:
    """What a run takes: the median of its other seeds on such a machine, else what its recipe costs there."""
    hashed = config_hash(cell.config)
    same = [
        record["cost"]["seconds"]
        for record in records
        if record["config_hash"] == hashed and record["hardware"]["name"] == machine_of(cell.config)
    ]
    if same:
        return statistics.median(same) / 60
    hours = device_hours(cell, sustained)
    return None if hours is None else 60 * hours


def fitting(steps: Sequence[Step], minutes: float, at_once: int) -> list[Cell]:
    """The runs of the steps that end within so many minutes, in their order, and of the first that does not: it is gone on with later."""
    left, found = minutes * at_once, list[Cell]()
    beyond: Step | None = None
    for step in steps:
        if step.minutes is not None and step.minutes <= left:
            found += step.cells
            left -= step.minutes
        else:
            beyond = beyond or step
    return [*found, *(beyond.cells if beyond and left > 0 else ())]
