"""A sweep's table and figure from the records of its runs."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trainers.files import write_atomically, write_text
from trainers.reports.figures import FORMATS, draw, save
from trainers.reports.tables import Table, build, markdown
from trainers.runs.compose import usual
from trainers.runs.identity import differences
from trainers.runs.plan import Cell
from trainers.runs.records import read_records
from trainers.runs.reproduce import setting_of
from trainers.runs.sweep import Point, Sweep, metrics_of


def write(
    sweep: Sweep, points: Sequence[Point], plan: Sequence[Cell], settings: Mapping[str, Any]
) -> tuple[Table, list[Path]]:
    """The sweep's table from the records, and its files in <results>/sweeps: Markdown, and a figure as PNG and PDF."""
    table = sweep.table(points, metrics_of(plan[-1]))
    results = Path(plan[-1].config["paths"]["results"])
    scale, protocol = settings["scale"], settings["protocol"]
    setting = setting_of(table["rows"], plan)
    changed = {cell.row: differences(usual(cell.config), cell.config) for cell in plan}
    for row in table["rows"]:  # a value that is the experiment's own changes nothing
        row["overrides"] = {
            key: value for key, value in row["overrides"].items() if key in changed[row["id"]]
        }
    built = build(
        table,
        read_records(results / "runs"),
        scale=scale,
        protocol=protocol,
        claims={sweep.experiment: [row["overrides"] for row in table["rows"]]},
        setting=setting,
    )
    stem = f"{sweep.name}-{scale}" + ("" if protocol == "official" else f"-{protocol}")
    paths = [results / "sweeps" / f"{stem}.md"]
    write_text(paths[0], markdown(built))
    if drawn := draw("ablation", built):
        for kind in FORMATS:
            paths.append(results / "sweeps" / f"{stem}.{kind}")
            write_atomically(paths[-1], partial(save, drawn, kind=kind))
    return built, paths
