"""Tables as a pure function of their configuration and the records.

    table = build(config, records, scale="smoke", protocol="official", claims=claims)
    print(markdown(table))

A cell shows the paper's value, ours as mean ± standard deviation with standard error (number of seeds) and, when it was run
on the paper's own data at paper scale, their difference. A stand-in never shows one.

A row is one experiment and its cells are metrics; or, in a table with `columns`, each cell is an experiment of its own
(`<the row's experiment>/<column>`, or the row's `experiments`) and shows one `metric`, with another `beside` it.

One file, since what a table holds and its two renderings change together.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainers.runs.plan import Overrides, experiments
from trainers.runs.records import Record

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """A printed line: fixed texts, a cell per metric, and where its numbers come from."""

    id: str
    label: Sequence[str]
    paper: Mapping[str, float | None]
    ours: Mapping[str, Sequence[float]]
    status: str
    comparable: bool
    note: str | None
    records: Sequence[Record]
    beside: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One row minus another over the seeds that both have, in one metric: points, with the interval's half-width."""

    ours: str
    other: str
    metric: str
    seeds: int
    mean: float
    half_width: float


@dataclass(frozen=True)
class Table:
    """What both renderings print. setting: what all its runs change against the scale's own configuration."""

    title: str
    scale: str
    protocol: str
    setting: str
    labels: Sequence[str]
    metrics: Mapping[str, str]
    rows: Sequence[Row]
    beside: str = ""
    comparisons: Sequence[Comparison] = field(default_factory=list)
    remarks: Sequence[str] = field(default_factory=list)


def values(
    config: Mapping[str, Any], row: Mapping[str, Any], record: Record, metric: str
) -> dict[str, float]:
    """What a record has for a row's cells: its metrics, or in a table with columns `metric` in those of its experiment."""
    if "columns" not in config:
        return {name: record["metrics"][name] for name in config["metrics"] if name in record["metrics"]}
    mine = [c for c, name in experiments(config, row).items() if name == record["experiment"]]
    return {column: record["metrics"][metric] for column in mine if metric in record["metrics"]}


def build(
    config: Mapping[str, Any],
    records: Sequence[Record],
    *,
    scale: str,
    protocol: str,
    claims: Mapping[str, Sequence[Overrides]],
    setting: Overrides | None = None,
) -> Table:
    """The table of one scale, protocol and setting.

    config: a file of configs/table. claims: experiment -> the overrides of every row of every table, so that a sweep's runs stand in
    the sweep's table alone.
    setting: what the runs shown change on top of their row's own overrides ({}: nothing).
    """
    setting = setting or {}
    placed = place(config, records, scale=scale, protocol=protocol, claims=claims)
    mine: dict[str, list[Record]] = {
        row["id"]: [r for r, own in placed.get(row["id"], []) if own == setting] for row in config["rows"]
    }
    rows = [_row(config, row, mine[row["id"]], scale, bool(setting)) for row in config["rows"]]
    named = {row.id: _name(row, rows) for row in rows}
    metrics = config.get("columns") or config["metrics"]
    by_id = {row["id"]: row for row in config["rows"]}
    seen = {
        name: [(r["seed"], values(config, by_id[name], r, config.get("metric", ""))) for r in runs]
        for name, runs in mine.items()
    }
    comparisons = [
        found
        for ours, other in config.get("compare", [])
        for found in _compare(metrics, named[ours], named[other], seen[ours], seen[other])
    ]
    shown = next((r for runs in mine.values() for r in runs), None)
    return Table(
        title=config["title"], scale=scale, protocol=protocol, setting=_told(setting, shown),
        labels=list(config["labels"].values()), metrics=metrics, rows=rows, beside=config.get("beside_name", ""),
        comparisons=comparisons, remarks=[*config.get("remarks", []), *_other_teachers(mine.values())],
    )  # fmt: skip


def place(
    config: Mapping[str, Any],
    records: Sequence[Record],
    *,
    scale: str,
    protocol: str,
    claims: Mapping[str, Sequence[Overrides]],
) -> dict[str, list[tuple[Record, Overrides]]]:
    """Row id -> its records, each with its setting: what it changes beside the row's own overrides.

    A record belongs to the rows whose overrides explain most of what it changes; different settings are never averaged, and where
    an experiment was run with two recipes, those of the earlier one are a setting of their own.
    """
    found: dict[str, list[tuple[Record, Overrides]]] = {}
    mine = {name for row in config["rows"] for name in experiments(config, row).values()}
    latest: dict[str, Record] = {}  # of each experiment and what it changes
    for record in records:
        experiment = record["experiment"]
        if (
            experiment not in mine
            or record["status"] != "done"
            or (record["scale"], record["protocol"]) != (scale, protocol)
        ):
            continue
        changed = record["changed"]
        most = max((len(o) for o in claims.get(experiment, ()) if _within(o, changed)), default=0)
        for row in config["rows"]:
            own = row.get("overrides") or {}
            if experiment in experiments(config, row).values() and _within(own, changed) and len(own) == most:
                rest = {k: v for k, v in changed.items() if k not in own}
                found.setdefault(row["id"], []).append((record, rest))
                latest[_asked(record)] = max(latest.get(_asked(record), record), record, key=_finished)
    return {
        row: [
            (
                r,
                own
                if r["config_hash"] == latest[_asked(r)]["config_hash"]
                else {**own, "recipe": r["config_hash"]},
            )
            for r, own in runs
        ]
        for row, runs in found.items()
    }


def _asked(record: Record) -> str:
    """What two runs of one recipe have in common, whatever the recipe was then."""
    return json.dumps([record["experiment"], record["changed"]], sort_keys=True)


def _finished(record: Record) -> str:
    return str(record["finished"])


def settings(placed: Mapping[str, Sequence[tuple[Record, Overrides]]]) -> list[Overrides]:
    """The different settings among a table's placed records, the scale's own ({}) left out."""
    every = {json.dumps(own, sort_keys=True): own for runs in placed.values() for _, own in runs if own}
    return [every[key] for key in sorted(every)]


def _within(overrides: Overrides, changed: Mapping[str, Any]) -> bool:
    return all(key in changed and changed[key] == value for key, value in overrides.items())


def _told(setting: Overrides, run: Record | None) -> str:
    """A setting for the reader: the data in words, the rest as it is typed."""
    if not setting or run is None:
        return ""
    data = [f"{run['data']['train']:,} training images of {run['data']['name']}"]
    rest = [f"{key}={value}" for key, value in setting.items() if not key.startswith("data.")]
    return ", ".join([*(data if any(key.startswith("data.") for key in setting) else []), *rest])


def _name(row: Row, rows: Sequence[Row]) -> str:
    """A row in a sentence: its first label, with the last where others share it, with the next where it is a mere letter."""
    first = row.label[0]
    if [other.label[0] for other in rows].count(first) > 1:
        return f"{first} ({row.label[-1]})"
    return f"{first}, {row.label[1]}" if len(first.rstrip("′")) == 1 < len(row.label) else first


def _compare(
    metrics: Mapping[str, str],
    ours: str,
    other: str,
    one: Sequence[tuple[int, Mapping[str, float]]],
    two: Sequence[tuple[int, Mapping[str, float]]],
) -> list[Comparison]:
    """Two rows in every metric of which both have at least two seeds; one, two: each run's seed and values."""
    found = []
    for metric, title in metrics.items():
        first, second = ({seed: v[metric] for seed, v in runs if metric in v} for runs in (one, two))
        differences = [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]
        if len(differences) > 1:
            mean, half = statistics.mean(differences), paired_half_width(differences)
            found.append(Comparison(ours, other, title, len(differences), mean, half))
    return found


def comparison_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence for each pair of rows, its metrics grouped by their number of seeds."""
    pairs: dict[tuple[str, str], dict[int, list[str]]] = {}
    for c in comparisons:
        parts = pairs.setdefault((c.ours, c.other), {})
        parts.setdefault(c.seeds, []).append(f"{c.metric} {c.mean:+.2f} ± {c.half_width:.2f}")
    return [
        f"{ours} minus {other}, "
        + "; ".join(
            f"paired over {n} seeds, mean ± half-width of the {100 * CONFIDENCE:.0f} % interval: {', '.join(found)} points"
            for n, found in parts.items()
        )
        + "."
        for (ours, other), parts in pairs.items()
    ]


def _other_teachers(rows: Iterable[Sequence[Record]]) -> list[str]:
    """A sentence for each teacher whose students here did not all learn from the same weights."""
    found: dict[str, set[str]] = {}
    for teacher in (r["teacher"] for runs in rows for r in runs if r.get("teacher")):
        found.setdefault(teacher.get("run") or teacher["published"], set()).add(teacher["sha256"][:12])
    return [
        f"The students of {name} were taught by {len(weights)} different weights of it ({', '.join(sorted(weights))}): compare those of "
        "one teacher alone."
        for name, weights in sorted(found.items())
        if len(weights) > 1
    ]


def paired_half_width(values: Sequence[float]) -> float:
    """Half-width of the Student interval of the mean of at least two paired differences."""
    from scipy.special import (
        stdtrit,
    )  # the quantiles of scipy.stats.t; half a second to load, which a plan need not wait for

    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error


def _row(
    config: Mapping[str, Any], row: Mapping[str, Any], runs: Sequence[Record], scale: str, changed: bool
) -> Row:
    label = [str(row[name]) for name in config["labels"]]
    stand_in = next((r["data"]["stand_in_for"] for r in runs if r["data"]["stand_in_for"]), None)
    found = [values(config, row, r, config.get("metric", "")) for r in runs]
    aside = [values(config, row, r, config["beside"]) for r in runs] if "beside" in config else []
    names = config.get("columns") or config["metrics"]
    ours, beside = ({name: [v[name] for v in some if name in v] for name in names} for some in (found, aside))
    if not experiments(config, row):
        status = "not yet"
    elif not any(ours.values()):
        status = f"missing: make {config['target']} SCALE={scale} ROWS={row['id']}"
        status = "not run at this setting" if changed else status
    elif stand_in:
        status = f"stand-in: {runs[0]['data']['name']} for {stand_in}{_other_network(runs[0])}"
    else:
        status = "done" if scale == "paper" else f"scale {scale}{_other_network(runs[0])}"
    if runs and any(
        not numbers for name, numbers in ours.items() if name in row["paper"] or "columns" not in config
    ):
        status += f"; some columns missing: make {config['target']} SCALE={scale} ROWS={row['id']}"
    attacked = {(r["evaluation"]["n"], r["data"]["test"]) for r in runs if "n" in r.get("evaluation", {})}
    if any(n < test for n, test in attacked):
        status += f", {min(n for n, _ in attacked)} images attacked"
    known = {
        *(row.get("overrides") or {}),
        "teacher.weights",
    }  # a published teacher is the paper's recipe as much as ours
    comparable = (
        bool(runs)
        and scale == "paper"
        and not stand_in
        and all(set(r.get("departures", {})) <= known for r in runs)
    )
    return Row(row["id"], label, row["paper"], ours, status, comparable, row.get("note"), runs, beside)


def _other_network(run: Record) -> str:
    """ ", wrn_10_1" where a run has another network than the published one, and whose generated pictures it has."""
    departures = run.get("departures", {})
    changed = [
        departures[key][1] for key in ("model.name", "generated.source") if departures.get(key, [0, 0])[1]
    ]
    return "".join(f", {name}" for name in changed)


def _number(values: Sequence[float]) -> tuple[str, str]:
    """mean ± sample standard deviation with the mean's standard error, and the number of seeds."""
    if not values:
        return "", ""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        spread = statistics.stdev(values)
        mean += f" ± {spread:.2f}, se {spread / math.sqrt(len(values)):.2f}"
    return mean, f"({len(values)})"


def _cells(table: Table, row: Row) -> list[str]:
    cells = []
    for metric in table.metrics:
        paper, ours = row.paper.get(metric), row.ours[metric]
        value, count = _number(ours)
        printed, own = f"{paper:.2f}" if paper is not None else "–", f"{value} {count}" if value else "–"
        if aside := row.beside.get(metric):
            own += f"; {statistics.mean(aside):.2f}"
        difference = (
            f"{statistics.mean(ours) - paper:+.2f}" if row.comparable and ours and paper is not None else "–"
        )
        cells += [f"{printed} / {own}"] if _wide(table) else [printed, own, difference]
    return cells


def _wide(table: Table) -> bool:
    """Whether a table has so many metrics, or such cells, that paper and ours share a column."""
    return len(table.metrics) > 3 or bool(table.beside)


def _header(table: Table) -> list[str]:
    columns = [f"{name}: {what}" for name in table.metrics.values() for what in ("paper", "ours", "diff.")]
    if _wide(table):
        aside = f"; {table.beside}" if table.beside else ""
        columns = [f"{name}: paper / ours{aside}" for name in table.metrics.values()]
    return [*table.labels, *columns, "status"]


def markdown(table: Table) -> str:
    """The table with its notes and the provenance of every number."""
    header = _header(table)
    numbers = len(header) - len(table.labels) - 1
    setting = f", {escaped(table.setting)}" if table.setting else ""
    lines = [
        f"## {table.title} — scale `{table.scale}`, protocol `{table.protocol}`{setting}",
        "",
        "| " + " | ".join(map(escaped, header)) + " |",
        "|" + "---|" * len(table.labels) + "---:|" * numbers + "---|",
    ]
    notes: list[str] = []
    for row in table.rows:
        status = row.status
        if row.note:
            if row.note not in notes:
                notes.append(row.note)
            status += f" [{notes.index(row.note) + 1}]"
        cells = [*row.label, *_cells(table, row), status]
        lines.append("| " + " | ".join(map(escaped, cells)) + " |")
    legend = (
        "Percent. Ours: mean ± sample standard deviation, se: standard error of the mean (seeds). "
        "Paper: the paper's printed value."
    )
    if any(row.status.startswith("stand-in") for row in table.rows):
        legend += " A stand-in ran on other data than the paper's: compare it with other stand-ins alone."
    lines += ["", legend, ""]
    if table.comparisons:
        lines += [*comparison_lines(table.comparisons), ""]
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    lines += [f"- {remark}" for remark in table.remarks]
    if any(row.records for row in table.rows):
        lines += ["", "<details><summary>Where each number comes from</summary>", ""]
        for row in table.rows:
            for r in row.records:
                lines.append(_provenance(r))
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _provenance(r: Record) -> str:
    metrics = ", ".join(f"{name} {value:.2f}" for name, value in sorted(r["metrics"].items()))
    data = r["data"]["name"] + (
        f" (stand-in for {r['data']['stand_in_for']})" if r["data"]["stand_in_for"] else ""
    )
    attacked = r.get("evaluation", {}).get("n")
    counted = f"{attacked} attacked" if attacked is not None else f"{r['data']['test']} tested"
    if teacher := r.get("teacher"):
        name = next(teacher[key] for key in ("run", "published", "file") if teacher.get(key))
        reached = [f"{teacher[key]:.2f}" for key in ("top1", "miou") if key in teacher]
        counted += f", taught by {name} ({', '.join([*reached, teacher['sha256'][:12]])})"
    commit = (r["code"].get("commit") or "unknown")[:9] + ("+" if r["code"].get("dirty") else "")
    return (
        f"- [`{r['path']}`](../runs/{r['path']}): {metrics}; {r['data']['train']} training images of {data}, "
        f"{counted}; code {commit}; "
        f"{r['hardware']['count']} × {r['hardware']['name']}, {r['cost']['device_hours']:.2f} h"
    )


def latex(table: Table) -> str:
    """A booktabs tabular of the same cells, without notes."""
    columns = "l" * len(table.labels) + "r" * (len(_header(table)) - len(table.labels) - 1) + "l"
    lines = [
        f"% {table.title}; scale {table.scale}, protocol {table.protocol}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(_tex(text) for text in _header(table)) + " \\\\",
        "\\midrule",
    ]
    for row in table.rows:
        lines.append(
            " & ".join(_tex(text) for text in [*row.label, *_cells(table, row), row.status]) + " \\\\"
        )
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


TEX = {
    "\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "|": "\\textbar{}", "<": "$<$", ">": "$>$",
    **{character: f"\\{character}" for character in "&%_#${}"},
    "±": "$\\pm$", "–": "--", "—": "---", "→": "$\\to$", "ε": "$\\varepsilon$", "λ": "$\\lambda$", "γ": "$\\gamma$", "β": "$\\beta$",
    "τ": "$\\tau$", "α": "$\\alpha$", "ℓ∞": "$\\ell_\\infty$", "×": "$\\times$", "′": "$'$", "=": "{=}",
}  # fmt: skip


def _tex(text: str) -> str:
    """Text as LaTeX shows it."""
    return re.sub("ℓ∞|.", lambda found: TEX.get(found[0], found[0]), text)


def escaped(text: str) -> str:
    """Text as every Markdown shows it in a cell: what would be a mark becomes an entity; an underscore within a word is none."""
    return re.sub(r"[\\|<*`~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)", lambda found: f"&#{ord(found[0])};", text)
