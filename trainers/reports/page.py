"""The report page: every table, curve and comparison of the records in one file that needs no server and no other file.

    write_text(Path("results/report.html"), page(records, Path("results")))

Tables are plain HTML, filled when the page is built; the filters hide what they leave out; charts are Vega-Lite, drawn when they
come into view. A number opens the runs behind it: their records, what they change, their command and configuration.
"""

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainers.errors import ConfigError
from trainers.reports import charts
from trainers.reports.dashboard import compared, runs_of
from trainers.reports.render import sections
from trainers.reports.tables import Comparison, Row, Table
from trainers.runs.compose import completed
from trainers.runs.plan import load_table, tables
from trainers.runs.records import Record

TEMPLATE = Path(__file__).with_name("page.html")
LIMIT_BYTES = 5_000_000
HEADINGS = {
    "differences": "GKL against the others, paired",
    "figure1": "Figure 1: clean accuracy against AutoAttack",
    "learning": "Learning curves",
    "ablation": "Ablations",
    "margins": "Figure 4: class margins",
    "scores": "Figure 3: class scores",
    "cost": "Cost",
}


@dataclass(frozen=True)
class Part:
    """A table or figure of one scale, protocol and setting, as the page shows it."""

    config: Mapping[str, Any]
    table: Table

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return f"{self.config['name']}-{self.table.scale}-{self.table.protocol}"


def page(records: Sequence[Record], results: Path) -> str:
    """The page's HTML. Raises ConfigError without the report extra's packages."""
    try:
        import jinja2
        import vl_convert
    except ImportError:
        raise ConfigError(
            "the report page needs Altair and its JavaScript: pip install 'gkl[report]'"
        ) from None
    numbers = {record["path"]: number for number, record in enumerate(records)}
    parts = {kind: _parts(kind, records) for kind in ("table", "figure")}
    drawn: list[charts.Chart] = []

    def place(made: Sequence[charts.Chart]) -> list[int]:
        drawn.extend(made)
        return list(range(len(drawn) - len(made), len(drawn)))

    shown = {
        "learning": [
            (part, place(charts.learning_curves(_compared_runs(part, rows), results / "runs")))
            for part in parts["table"]
            if len(rows := compared(part.config, part.table)) > 1
        ],
        "figure1": [
            (p, place(charts.clean_against_aa(p.table))) for p in _named(parts["figure"], "clean_against_aa")
        ],
        "ablation": [(p, place(charts.ablation(p.table))) for p in _named(parts["table"], "ablation")],
        "margins": [(p, place(charts.margins(p.table))) for p in _named(parts["figure"], "structure")],
        "scores": [(p, place(charts.class_scores(p.table))) for p in _named(parts["figure"], "class_scores")],
        "cost": [(p, place(charts.cost(p.table))) for p in parts["table"] if _has_records(p)],
        "differences": [
            (p, place(_differences(p.table.comparisons))) for p in parts["table"] if p.table.comparisons
        ],
    }
    data = {
        "runs": [_run(record) for record in records],
        "configs": {record["config_hash"]: record["config"] for record in records},
        "charts": drawn,
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        parts=parts["table"],
        titles=dict.fromkeys((p.config["name"], p.table.title) for p in parts["table"]),
        scales=list(dict.fromkeys(p.table.scale for p in parts["table"])),
        protocols=list(dict.fromkeys(p.table.protocol for p in parts["table"])),
        shown={name: [(part, ids) for part, ids in found if ids] for name, found in shown.items()},
        cells=lambda part: [(row, _cells(part.table, row, numbers)) for row in part.table.rows],
        headings=HEADINGS,
        count=len(records),
        latest=max(record["finished"] for record in records)[:10] if records else "none",
        data=_script(data),
        javascript=vl_convert.javascript_bundle("Object.assign(window, { vegaEmbed });").replace(
            "</script", "<\\/script"
        ),
        vega=version("altair"),
    )
    if len(text.encode()) > LIMIT_BYTES:
        raise ConfigError(
            f"the report page has {len(text.encode()):,} bytes, more than the {LIMIT_BYTES:,} it may"
        )
    return text


def _script(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _parts(kind: str, records: Sequence[Record]) -> list[Part]:
    return [
        Part(config, table)
        for config in (load_table(number, kind) for number in tables(kind))
        for table in sections(config, records)
    ]


def _named(parts: Sequence[Part], drawing: str) -> list[Part]:
    """The parts with that drawing: those with records, or the paper's values alone where there are none."""
    mine = [part for part in parts if part.config.get("draw") == drawing]
    full = {part.config["name"] for part in mine if _has_records(part)}
    return [part for part in mine if _has_records(part) or part.config["name"] not in full]


def _has_records(part: Part) -> bool:
    return any(row.records for row in part.table.rows)


def _compared_runs(part: Part, rows: Sequence[Row]) -> Mapping[str, Sequence[Record]]:
    """The runs behind a table's compared rows by what a reader calls the rows."""
    names = {
        f"{part.config['name']}/{row.id}": ", ".join(text for text in row.label if text != "–")
        for row in rows
    }
    return {names.get(name, name): found for name, found in runs_of(part.config, rows)[1].items()}


def _differences(comparisons: Sequence[Comparison]) -> list[charts.Chart]:
    return charts.differences(
        [
            {"name": f"{c.ours} minus {c.other}", "metric": c.metric, "mean": round(c.mean, 3), "seeds": c.seeds,
             "low": round(c.mean - c.half_width, 3), "high": round(c.mean + c.half_width, 3)}
            for c in comparisons
        ]
    )  # fmt: skip


def _cells(table: Table, row: Row, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """What each of a row's cells shows: the paper's value, ours, their difference, and the runs behind ours."""
    cells = []
    for metric in table.metrics:
        ours, paper = row.ours[metric], row.paper.get(metric)
        cells.append(
            {
                "paper": f"{paper:.2f}" if paper is not None else "–",
                "mean": f"{statistics.mean(ours):.2f}" if ours else None,
                "spread": f"{statistics.stdev(ours):.2f}" if len(ours) > 1 else None,
                "seeds": len(ours),
                "difference": f"{statistics.mean(ours) - paper:+.2f}" if row.comparable and ours and paper is not None else None,
                "runs": " ".join(str(numbers[r["path"]]) for r in row.records if _shows(table, row, r, metric)),
                "metric": metric,
            }
        )  # fmt: skip
    return cells


def _shows(table: Table, row: Row, record: Record, metric: str) -> bool:
    """Whether a record has part in the row's cell of that metric, or of that column."""
    return metric in record["metrics"] or (
        metric not in record["metrics"] and record["experiment"].endswith(f"/{metric}")
    )


def _run(record: Record) -> dict[str, Any]:
    """What the page tells of a run."""
    return {
        "path": record["path"], "experiment": record["experiment"], "scale": record["scale"], "seed": record["seed"],
        "metrics": {name: round(value, 2) for name, value in record["metrics"].items()}, "hash": record["config_hash"],
        "departures": record.get("departures", {}), "command": command(record), "finished": record["finished"],
        "recipe": f"configs/{completed(record['experiment'])[0].replace('=', '/')}.yaml",
        "data": record["data"]["name"], "stand_in_for": record["data"]["stand_in_for"],
        "commit": (record["code"].get("commit") or "unknown")[:9], "hours": record["cost"]["device_hours"],
        "machine": f"{record['hardware']['count']} × {record['hardware']['name']}",
    }  # fmt: skip


def command(record: Record) -> str:
    """What starts the record's run again: composed, it has the record's hash. Pictures of one's own stand as PATH."""
    words = [f"{key}={record[key]}" for key in ("experiment", "scale", "protocol", "seed")]
    if record["protocol"] == "official":
        words.remove("protocol=official")
    return "python scripts/train.py " + shlex.join([*words, *record["overrides"]])
