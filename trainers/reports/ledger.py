"""What the records say of each of the paper's claims: a line for each scale and setting in which both sides of it were run.

    write_text(Path("results/claims.md"), markdown(ledger(records)))

The rule, for every line alike: `supported` where the 95 % Student interval of the paired difference lies above 0, `contradicted` where
it lies below, else `undecided`, with the number of paired seeds that would decide it: those with which such an interval excludes 0 in
80 of 100 trials, were the mean and the spread seen the true ones. One pair of seeds, or none, decides nothing. No line is left out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from scipy.special import stdtrit

from trainers.errors import ConfigError
from trainers.reports.computed import COMPUTED
from trainers.reports.render import sections
from trainers.reports.tables import CONFIDENCE, Row, Table, escaped, paired_half_width
from trainers.runs.plan import load_table
from trainers.runs.records import Record
from trainers.runs.targets import CONFIGS

POWER = 0.8
MOST = 1000  # seeds; what needs more is as good as no difference


@dataclass(frozen=True)
class Line:
    """One claim in one setting. differences: ours minus the other, by seed. seconds: of a pair of runs, as recorded."""

    pair: str
    where: str
    metric: str
    differences: Sequence[float]
    seconds: float
    records: Sequence[str]

    @property
    def mean(self) -> float:
        """Difference."""
        return statistics.mean(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean difference; None below two seeds."""
        if len(self.differences) < 2:
            return None
        half = paired_half_width(self.differences)
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        """By the rule above."""
        if self.interval is None:
            return "undecided: one pair"
        if self.interval[0] > 0:
            return "supported"
        if self.interval[1] < 0:
            return "contradicted"
        needed = seeds_needed(self.mean, statistics.stdev(self.differences))
        if needed is None:
            return f"undecided, and would be with {MOST} seeds"
        hours = (needed - len(self.differences)) * self.seconds / 3600
        return f"undecided; {needed} seeds would decide it, {hours:.1f} h more" if hours > 0 else "undecided"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper in our words, where it stands, the rows it sets against each other, and what the records say."""

    name: str
    text: str
    where: str
    pairs: Sequence[Mapping[str, Any]]
    lines: Sequence[Line] = field(default_factory=list)
    missing: Sequence[str] = field(default_factory=list)
    computed: str = ""


def seeds_needed(mean: float, spread: float) -> int | None:
    """Paired seeds with which the interval of a difference of this mean and standard deviation excludes 0 with POWER; None above MOST."""
    for n in range(2, MOST + 1):
        quantiles = stdtrit(n - 1, (1 + CONFIDENCE) / 2) + stdtrit(n - 1, POWER)
        if quantiles * spread / math.sqrt(n) <= abs(mean):
            return n
    return None


def ledger(records: Sequence[Record]) -> list[Claim]:
    """Every claim of configs/claim in the order of its files."""
    made: dict[tuple[str, str], list[Table]] = {}
    found = []
    for path in sorted((CONFIGS / "claim").glob("*.yaml")):
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
        lines, missing, pairs = [], [], config.get("pairs", [])
        for pair in pairs:
            kind, number = place_of(pair)
            if (kind, number) not in made:
                made[kind, number] = sections(load_table(number, kind), records)
            new = [line for table in made[kind, number] for line in _lines(table, pair)]
            lines += new
            if not any(len(line.differences) > 1 for line in new):
                missing.append(
                    f"make {kind}{number} SCALE=small ROWS={pair['ours']},{pair['other']} SEEDS=0,1,2,3,4"
                )
        computed = COMPUTED[config["computed"]](records) if "computed" in config else ""
        found.append(Claim(path.stem, config["claim"], config["where"], pairs, lines, missing, computed))
    return found


def place_of(pair: Mapping[str, Any]) -> tuple[str, str]:
    """Whether a pair's rows are a table's or a figure's, and its number."""
    kind = "table" if "table" in pair else "figure"
    return kind, str(pair[kind])


def _lines(table: Table, pair: Mapping[str, Any]) -> list[Line]:
    rows = {row.id: row for row in table.rows}
    for name in ("ours", "other"):
        if pair[name] not in rows:
            raise ConfigError(
                f"a claim names the row {pair[name]!r} of {table.title}, which has none of that name"
            )
    ours, other = rows[pair["ours"]], rows[pair["other"]]
    found = []
    measure = pair.get("measure")
    metrics = {measure: pair["title"]} if measure else table.metrics
    for metric, title in metrics.items():
        if metric not in pair.get("metrics", metrics):
            continue
        find = _assessed if measure else _by_seed
        one, two = find(ours, metric), find(other, metric)
        if both := sorted(one.keys() & two.keys()):
            runs = [side[seed][1] for seed in both for side in (one, two)]
            words = [table.scale, table.protocol if table.protocol != "official" else "", table.setting]
            stand_in = ours.status.startswith("stand-in: ")
            data = f" ({ours.status.removeprefix('stand-in: ').split(';')[0]})" if stand_in else ""
            line = Line(
                pair=f"{_label(ours)} against {_label(other)}",
                where=f"{table.title.split(':')[0]}, {', '.join(filter(None, words))}{data}",
                metric=title,
                differences=[one[seed][0] - two[seed][0] for seed in both],
                seconds=2 * statistics.median(run["cost"]["seconds"] for run in runs),
                records=[run["path"] for run in runs],
            )
            found.append(line)
    return found


def _label(row: Row) -> str:
    """A row in a sentence."""
    return ", ".join(dict.fromkeys(text for text in row.label if text not in ("–", "")))


def _by_seed(row: Row, metric: str) -> dict[int, tuple[float, Record]]:
    """Seed -> value and record, of those records whose value the row's cell has."""
    values = list(row.ours[metric])
    mine = [r for r in row.records if metric in r["metrics"] or _column(r, metric)]
    if len(mine) != len(
        values
    ):  # a row of several experiments: its column's records alone have the cell's values
        mine = [r for r in mine if _column(r, metric)]
    return {r["seed"]: (value, r) for r, value in zip(mine, values, strict=True)}


def _assessed(row: Row, measure: str) -> dict[int, tuple[float, Record]]:
    """Seed -> mean over the classes of what an assessment found for each, "structure.margins", in percent, and record."""
    name, _, key = measure.partition(".")
    return {
        r["seed"]: (100 * statistics.mean(r["assessments"][name]["details"][key]), r)
        for r in row.records
        if name in r["assessments"]
    }


def _column(record: Record, metric: str) -> bool:
    return bool(record["experiment"].rpartition("/")[2] == metric)


def counted(claims: Sequence[Claim]) -> str:
    """How many lines have which verdict, where there are several seeds."""
    verdicts = [
        line.verdict.split(":")[0].split(";")[0].split(",")[0]
        for c in claims
        for line in c.lines
        if line.interval
    ]
    words = ("supported", "contradicted", "undecided")
    return (
        ", ".join(f"{verdicts.count(word)} {word}" for word in words)
        + f" of {len(verdicts)} lines with several seeds"
    )


def markdown(claims: Sequence[Claim]) -> str:
    """The ledger as a page."""
    head = [
        "<!-- Written by scripts/report.py from configs/claim and results/runs; do not edit. -->",
        "",
        "# What the records say of the paper's claims",
        "",
        "Ours minus the other, paired by seed, in points; the 95 % Student interval of its mean. **supported**: the interval lies above 0; "
        "**contradicted**: below; else **undecided**, with the number of paired seeds that would decide it (an interval without 0 in "
        "80 of 100 trials, were the mean and spread seen the true ones) and the hours that the missing ones would take where these ran. "
        "Every setting in which both sides were run has its line. Only scale `paper` speaks of the paper's numbers; `small` and `smoke` "
        "are [stand-ins](../docs/reproducing-a-table.md#stand-ins).",
        "",
        f"{counted(claims)}.",
    ]
    for claim in claims:
        head += ["", f"## {claim.text}", "", f"{claim.where}."]
        if claim.computed:
            head += ["", f"**{claim.computed}**"]
        if claim.lines:
            head += [
                "",
                "| compared | setting | metric | difference | 95 % interval | n | verdict |",
                "|---|---|---|---:|---:|---:|---|",
            ]
        for line in claim.lines:
            low_high = f"{line.interval[0]:+.2f} to {line.interval[1]:+.2f}" if line.interval else "–"
            cells = (
                line.pair,
                line.where,
                line.metric,
                f"{line.mean:+.2f}",
                low_high,
                str(len(line.differences)),
                line.verdict,
            )
            head.append("| " + " | ".join(map(escaped, cells)) + " |")
        for command in claim.missing:
            head += ["", f"Not yet run with several seeds: `{command}`"]
        if claim.lines:
            links = [
                f"[{path}](runs/{path})"
                for path in dict.fromkeys(p for line in claim.lines for p in line.records)
            ]
            head += [
                "",
                "<details><summary>Records</summary>",
                "",
                *(f"- {link}" for link in links),
                "",
                "</details>",
            ]
    return "\n".join(head) + "\n"
