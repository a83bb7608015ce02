"""The report page: every table, curve and comparison of the records in one file that needs no server and no other file.

    write_text(Path("results/report.html"), page(records, Path("results")))

Tables are plain HTML, filled when the page is built; the filters hide what they leave out; charts are Vega-Lite, drawn when they
come into view. A number opens the runs behind it: their records, what they change, their command and configuration.
"""

import hashlib
import json
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.errors import ConfigError
from trainers.reports.dashboard import compared, runs_of
from trainers.reports.ledger import Claim
from trainers.reports.render import sections
from trainers.reports.tables import Comparison, Row, Table
from trainers.runs.compose import completed
from trainers.runs.plan import load_table, tables
from trainers.runs.records import Record

if TYPE_CHECKING:
    from trainers.reports.chart_forms import Chart

TEMPLATE = Path(__file__).with_name("page.html")
LIMIT_BYTES = 5_000_000
SNIPPET = "Object.assign(window, { vegaEmbed });"  # what the page takes of the bundled JavaScript
HEADINGS = {
    "differences": "GKL against the others, paired",
    "figure1": "Figure 1: clean accuracy against AutoAttack",
    "learning": "Learning curves",
    "ablation": "Ablations",
    "margins": "Figure 4: class margins",
    "scores": "Figure 3: class scores",
    "segmentations": "Table XXIII: segmentations",
    "questions": "Table VIII: questions and answers",
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


def page(records: Sequence[Record], results: Path, claims: Sequence[Claim] = ()) -> str:
    """The page's HTML. Raises ConfigError without the report extra's packages.

    results: the folder that the page will lie in, with the runs' histories, and the page that was there before. claims: what the
    records say of the paper's, a section of its own.
    """
    if any(find_spec(name) is None for name in ("altair", "jinja2", "vl_convert")):
        raise ConfigError("the report page needs Altair and its JavaScript: pip install 'gkl[report]'")
    import jinja2

    numbers = {record["path"]: number for number, record in enumerate(records)}
    parts = {kind: _parts(kind, records) for kind in ("table", "figure")}
    made = _charts(parts, results / "runs")
    drawn: list[Chart] = []
    shown: dict[str, list[tuple[Part, list[int]]]] = {name: [] for name in made}
    for name, found in made.items():
        for part, some in found:
            if some:
                shown[name].append((part, list(range(len(drawn), len(drawn) + len(some)))))
                drawn.extend(some)
    data = {
        "runs": [_run(record) for record in records],
        "configs": {record["config_hash"]: record["config"] for record in records},
        "charts": drawn,
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    javascript, digest = _javascript(results / "report.html")
    text = template.render(
        parts=parts["table"],
        titles=dict.fromkeys((p.config["name"], p.table.title) for p in parts["table"]),
        scales=list(dict.fromkeys(p.table.scale for p in parts["table"])),
        protocols=list(dict.fromkeys(p.table.protocol for p in parts["table"])),
        shown=shown,
        cells=lambda part: [(row, _cells(part.table, row, numbers)) for row in part.table.rows],
        claims=claims,
        runs_of=lambda line: " ".join(str(numbers[path]) for path in line.records),
        headings=HEADINGS,
        count=len(records),
        latest=max(record["finished"] for record in records)[:10] if records else "none",
        data=_script(data),
        javascript=javascript,
        digest=digest,
        vega=version("altair"),
    )
    if len(text.encode()) > LIMIT_BYTES:
        raise ConfigError(
            f"the report page has {len(text.encode()):,} bytes, more than the {LIMIT_BYTES:,} it may"
        )
    return text


def _charts(parts: Mapping[str, Sequence[Part]], runs: Path) -> dict[str, list[tuple[Part, list["Chart"]]]]:
    """The charts of each section of HEADINGS by table or figure, in the order in which the page numbers them."""
    from trainers.reports import charts

    tables, figures = parts["table"], parts["figure"]
    compares = [(p, rows) for p in tables if len(rows := compared(p.config, p.table)) > 1]
    return {
        "learning": [(p, charts.learning_curves(_compared_runs(p, rows), runs)) for p, rows in compares],
        "figure1": [(p, charts.clean_against_aa(p.table)) for p in _named(figures, "clean_against_aa")],
        "ablation": [(p, charts.ablation(p.table)) for p in _named(tables, "ablation")],
        "margins": [(p, charts.margins(p.table)) for p in _named(figures, "structure")],
        "scores": [(p, charts.class_scores(p.table)) for p in _named(figures, "class_scores")],
        "segmentations": [(p, charts.segmentations(p.table)) for p in _named(tables, "segmentations")],
        "questions": [(p, charts.questions(p.table)) for p in _named(tables, "questions")],
        "cost": [(p, charts.cost(p.table)) for p in tables if _has_records(p)],
        "differences": [
            (p, charts.differences(_intervals(p.table.comparisons))) for p in tables if p.table.comparisons
        ],
    }


def _javascript(before: Path) -> tuple[str, str]:
    """What draws the charts in a browser, and the digest that names it.

    Bundling takes seconds: the page that was there before has the same script, where the digest in it says so.
    """

    import vl_convert

    def digest(text: str) -> str:
        return hashlib.sha256(f"{version('vl-convert-python')} {SNIPPET} {text}".encode()).hexdigest()

    if before.is_file():
        page = before.read_text(encoding="utf-8", errors="replace")
        found = re.search(r'<script id="vega" data-digest="(\w+)">(.*?)</script>', page, re.DOTALL)
        if found and found[1] == digest(found[2]):
            return found[2], found[1]
    made = vl_convert.javascript_bundle(SNIPPET).replace("</script", "<\\/script")
    return made, digest(made)


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


def _intervals(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons as trainers.reports.charts.differences takes them."""
    return [
        {"name": f"{c.ours} minus {c.other}", "metric": c.metric, "mean": round(c.mean, 3), "seeds": c.seeds,
         "low": round(c.mean - c.half_width, 3), "high": round(c.mean + c.half_width, 3)}
        for c in comparisons
    ]  # fmt: skip


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
