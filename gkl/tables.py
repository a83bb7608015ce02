"""Tables as a pure function of their configuration and the records.

    table = build(config, records, scale="smoke", protocol="official", expected={"gkl_basic": config_of_the_run})
    print(markdown(table))

A cell shows the paper's value, ours as mean ± standard deviation (number of seeds) and, when it was run on the paper's
own data at paper scale, their difference. A stand-in never shows one.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gkl.records import Record, differences, identity


@dataclass(frozen=True)
class Row:
    """A printed line: fixed texts, a cell per metric, and where its numbers come from."""

    label: Sequence[str]
    paper: Mapping[str, float | None]
    ours: Mapping[str, Sequence[float]]
    status: str
    comparable: bool
    note: str | None
    records: Sequence[Record]


@dataclass(frozen=True)
class Table:
    """What both renderings print."""

    title: str
    scale: str
    protocol: str
    labels: Sequence[str]
    metrics: Mapping[str, str]
    rows: Sequence[Row]
    remarks: Sequence[str] = field(default_factory=list)


def build(
    config: Mapping[str, Any],
    records: Sequence[Record],
    *,
    scale: str,
    protocol: str,
    expected: Mapping[str, Mapping[str, Any]],
) -> Table:
    """The table of one scale and protocol.

    config: a file of configs/table. expected: row id -> resolved configuration that its run has at this scale without overrides.
    Records of the row's experiment with another identity (another data set, a subset) become lines of their own,
    labelled by what they change; different runs are never averaged.
    """
    rows: list[Row] = []
    for row in config["rows"]:
        label = [str(row[name]) for name in config["labels"]]
        mine = [
            r for r in records
            if r["experiment"] == row["experiment"] and r["scale"] == scale and r["protocol"] == protocol
            and r["status"] == "done"
        ]  # fmt: skip
        usual = expected.get(row["id"], {})
        regular = [r for r in mine if r["identity"] == identity(usual)]
        rows.append(_row(config, row, label, regular, scale))
        for other in sorted({r["identity"] for r in mine} - {identity(usual)}):
            runs = [r for r in mine if r["identity"] == other]
            line = [f"— {_changes(runs[0], usual)}", *[""] * (len(label) - 1)]
            rows.append(_row(config, {**row, "paper": {}, "note": None}, line, runs, scale))
    return Table(
        title=config["title"], scale=scale, protocol=protocol, labels=list(config["labels"].values()),
        metrics=config["metrics"], rows=rows, remarks=config.get("remarks", []),
    )  # fmt: skip


def _row(
    config: Mapping[str, Any],
    row: Mapping[str, Any],
    label: Sequence[str],
    runs: Sequence[Record],
    scale: str,
) -> Row:
    stand_in = next((r["data"]["stand_in_for"] for r in runs if r["data"]["stand_in_for"]), None)
    if not row["experiment"]:
        status = "not yet"
    elif not runs:
        status = f"missing: make {config['target']} SCALE={scale} ROWS={row['id']}"
    elif stand_in:
        status = f"stand-in: {runs[0]['data']['name']} for {stand_in}{_other_network(runs[0])}"
    else:
        status = "done" if scale == "paper" else f"scale {scale}{_other_network(runs[0])}"
    attacked = {(r["evaluation"]["n"], r["data"]["test"]) for r in runs if "n" in r.get("evaluation", {})}
    if any(n < test for n, test in attacked):
        status += f", {min(n for n, _ in attacked)} images attacked"
    ours = {
        metric: [r["metrics"][metric] for r in runs if metric in r["metrics"]] for metric in config["metrics"]
    }
    comparable = (
        bool(runs) and scale == "paper" and not stand_in and not any(r.get("departures") for r in runs)
    )
    return Row(label, row["paper"], ours, status, comparable, row.get("note"), runs)


def _other_network(run: Record) -> str:
    """ ", wrn_10_1" where a run has another network than the published one."""
    changed = run.get("departures", {}).get("model.name")
    return f", {changed[1]}" if changed else ""


def _changes(run: Record, usual: Mapping[str, Any]) -> str:
    """What a run changes against its row's usual one, without what its status says anyway."""
    told = ("data.", "evaluation.images", "model.name")
    changed = {k: v[1] for k, v in differences(usual, run["config"]).items() if not k.startswith(told)}
    parts = [f"{run['data']['train']:,} training images of {run['data']['name']}"]
    return ", ".join([*parts, *(f"{key}={value}" for key, value in changed.items())])


def _number(values: Sequence[float]) -> tuple[str, str]:
    """mean ± sample standard deviation, and the number of seeds."""
    if not values:
        return "", ""
    mean = f"{statistics.mean(values):.2f}"
    return (f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean), f"({len(values)})"


def _cells(table: Table, row: Row) -> list[str]:
    cells = []
    for metric in table.metrics:
        paper, ours = row.paper.get(metric), row.ours[metric]
        value, count = _number(ours)
        cells += [f"{paper:.2f}" if paper is not None else "–", f"{value} {count}" if value else "–"]
        cells.append(f"{statistics.mean(ours) - paper:+.2f}" if row.comparable and paper is not None else "–")
    return cells


def _header(table: Table) -> list[str]:
    return [
        *table.labels,
        *(f"{name}: {what}" for name in table.metrics.values() for what in ("paper", "ours", "diff.")),
        "status",
    ]


def markdown(table: Table) -> str:
    """The table with its notes and the provenance of every number."""
    header = _header(table)
    numbers = 3 * len(table.metrics)
    lines = [
        f"## {table.title} — scale `{table.scale}`, protocol `{table.protocol}`",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(table.labels) + "---:|" * numbers + "---|",
    ]
    notes: list[str] = []
    for row in table.rows:
        status = row.status
        if row.note:
            if row.note not in notes:
                notes.append(row.note)
            status += f" [{notes.index(row.note) + 1}]"
        lines.append("| " + " | ".join([*row.label, *_cells(table, row), status]) + " |")
    legend = "Percent. Ours: mean ± sample standard deviation (seeds). Paper: the paper's printed value."
    if any(row.status.startswith("stand-in") for row in table.rows):
        legend += " A stand-in ran on other data than the paper's: compare it with other stand-ins alone."
    lines += ["", legend, ""]
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
    commit = (r["code"].get("commit") or "unknown")[:9] + ("+" if r["code"].get("dirty") else "")
    return (
        f"- [`{r['path']}`](../runs/{r['path']}): {metrics}; {r['data']['train']} training images of {data}, "
        f"{attacked if attacked is not None else r['data']['test']} attacked; code {commit}; "
        f"{r['hardware']['count']} × {r['hardware']['name']}, {r['cost']['device_hours']:.2f} h"
    )


def latex(table: Table) -> str:
    """A booktabs tabular of the same cells, without notes."""
    columns = "l" * len(table.labels) + "r" * (3 * len(table.metrics)) + "l"
    lines = [
        f"% {table.title}; scale {table.scale}, protocol {table.protocol}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(_escape(text) for text in _header(table)) + " \\\\",
        "\\midrule",
    ]
    for row in table.rows:
        lines.append(
            " & ".join(_escape(text) for text in [*row.label, *_cells(table, row), row.status]) + " \\\\"
        )
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    for plain, tex in (
        ("\\", "\\textbackslash{}"), ("&", "\\&"), ("%", "\\%"), ("_", "\\_"), ("#", "\\#"), ("$", "\\$"),
        ("±", "$\\pm$"), ("–", "--"), ("—", "---"), ("ε", "$\\varepsilon$"), ("λ", "$\\lambda$"), ("γ", "$\\gamma$"),
        ("β", "$\\beta$"), ("τ", "$\\tau$"), ("ℓ∞", "$\\ell_\\infty$"), ("=", "{=}"),
    ):  # fmt: skip
        text = text.replace(plain, tex)
    return text
