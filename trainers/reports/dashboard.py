"""wandb workspaces as code: for each table that compares rows, their runs side by side, and a preview drawn from our own records.

A workspace is built from a table and its records alone, so that no panel asks for what no run has logged; it needs no login until
it is pushed. The preview reads the workspace's JSON as the service would and draws its panels from the records' files.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.errors import ConfigError
from trainers.reports.figures import BLACK, BLUE, RED, provenance
from trainers.reports.tables import Row, Table
from trainers.runs.plan import experiments
from trainers.runs.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[Record]]  # what wandb groups by -> its runs
COLOURS = (RED, BLUE, BLACK, "#009E73", "#CC79A7", "#E69F00")


def compared(config: Mapping[str, Any], table: Table) -> list[Row]:
    """The rows that a table sets against each other and that have records, the baseline first."""
    names = list(dict.fromkeys(name for pair in config.get("compare", []) for name in reversed(pair)))
    rows = {row.id: row for row in table.rows}
    return [rows[name] for name in names if rows[name].records]


def runs_of(config: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, dict[str, list[Record]]]:
    """How wandb groups the rows' runs, and the groups; of a table with columns the experiments of the column with most runs."""
    if "columns" not in config:
        return "group", {f"{config['name']}/{row.id}": list(row.records) for row in rows}
    by_id = {row["id"]: experiments(config, row) for row in config["rows"]}
    columns = {
        column: {
            name: found
            for row in rows
            if (name := by_id[row.id].get(column))
            and (found := [record for record in row.records if record["experiment"] == name])
        }
        for column in config["columns"]
    }
    return "experiment", max(columns.values(), key=lambda groups: sum(map(len, groups.values())))


def history(record: Record, runs: Path) -> list[dict[str, float]]:
    """A record's history, one row an epoch; a run that measures weights as they are has none."""
    if not record["config"]["epochs"]:
        return []
    path = (runs / record["path"]).with_name(record["history"])
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def workspace(config: Mapping[str, Any], table: Table, runs: Path, *, project: str, entity: str) -> Any:
    """The workspace of a table's compared rows at its scale. Raises ConfigError without wandb-workspaces."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces.expr import And
    except ImportError:
        raise ConfigError("a dashboard needs wandb-workspaces: pip install 'gkl[dashboard]'") from None
    by, groups = runs_of(config, compared(config, table))
    everything = [record for found in groups.values() for record in found]
    logged = dict.fromkeys(key for record in everything for row in history(record, runs)[-1:] for key in row)
    measured = dict.fromkeys(name for record in everything for name in record["metrics"])
    group = {"groupby": "Group" if by == "group" else panels.Config("experiment"), "groupby_aggfunc": "mean"}

    def lines(prefix: str) -> list[Any]:
        return [
            panels.LinePlot(
                title=key, x="epoch", y=[key], title_x="epoch", groupby_rangefunc="minmax", **group
            )
            for key in logged
            if key.startswith(prefix)
        ]

    results = [
        panels.BarPlot(title=name, metrics=[name], groupby_rangefunc="stddev", **group) for name in measured
    ]
    if {"clean", "aa"} <= set(measured):
        results.insert(
            0,
            panels.ScatterPlot(
                title="clean against AA", x=panels.SummaryMetric("clean"), y=panels.SummaryMetric("aa")
            ),
        )
    parts = [
        ("Results (mean, standard deviation over seeds)", results),
        ("Accuracy while training (mean, range over seeds)", [*lines("test/"), *lines("train/")]),
        ("Terms of the loss", lines("loss/")),
        ("What differs between the runs", [panels.RunComparer(diff_only="split")]),
    ]
    asked = ws.Metric("Group") if by == "group" else ws.Config("experiment")
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"KL against GKL, {config['name']}, scale {table.scale}",  # plain: the library takes ∞ for an emoji
        sections=[
            ws.Section(
                name=name,
                panels=found,
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=2),
            )
            for name, found in parts
            if found
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=20),
        runset_settings=ws.RunsetSettings(
            filters=And(ws.Config("scale") == table.scale, asked.isin(list(groups))),
            groupby=[ws.Config("table"), ws.Config("row"), ws.Config("seed")],
        ),
    )


def spec(made: Any) -> dict[str, Any]:
    """A workspace's JSON, with panels numbered where the library draws lots, so that the same records give the same bytes."""
    text = made._model.model_dump(by_alias=True, exclude_none=True, mode="json")
    for number, panel in enumerate(panels_of(text)):
        panel["__id__"] = f"panel{number}"
    return dict(text)


def panels_of(text: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every panel of a workspace's JSON in order."""
    return [panel for part in _sections(text) for panel in part["panels"]]


def _sections(text: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(text["spec"]["section"]["panelBankConfig"]["sections"])


def preview(text: Mapping[str, Any], config: Mapping[str, Any], table: Table, runs: Path) -> "Figure":
    """The workspace's panels drawn from the records: what the service shows of the same runs, in our own hand."""
    from matplotlib.figure import Figure

    _, groups = runs_of(config, compared(config, table))
    colours = dict(zip(groups, COLOURS * (1 + len(groups) // len(COLOURS)), strict=False))
    shown = [
        (part["name"], [p for p in part["panels"] if p["viewType"] in DRAWN]) for part in _sections(text)
    ]
    shown = [(name, found) for name, found in shown if found]
    rows = [-(-len(found) // 3) for _, found in shown]
    figure = Figure(figsize=(11, 2.2 * sum(rows) + 0.9), layout="constrained")
    figure.suptitle(
        f"{table.title}: KL against GKL\n{provenance(table)}\npreview from the records; wandb draws the same panels of its runs",
        fontsize=10,
    )
    for part, (name, found), height in zip(
        figure.subfigures(len(shown), height_ratios=rows, squeeze=False)[:, 0], shown, rows, strict=True
    ):
        part.suptitle(name, fontsize=9, fontweight="bold", x=0.01, ha="left")
        axes = part.subplots(height, 3, squeeze=False).ravel()
        for panel, place in zip(found, axes, strict=False):
            DRAWN[panel["viewType"]](place, panel["config"], groups, colours, runs)
            place.set_title(panel["config"]["chartTitle"], fontsize=8)
            place.tick_params(labelsize=7)
        for place in axes[len(found) :]:
            place.axis("off")
    handles = [_handle(name, colour) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _handle(name: str, colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, label=name)


def _line(axes: Any, panel: Mapping[str, Any], groups: Runs, colours: Mapping[str, str], runs: Path) -> None:
    (metric,) = panel["metrics"]
    for name, found in groups.items():
        curves = [
            {row["epoch"]: row[metric] for row in history(record, runs) if metric in row} for record in found
        ]
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[epoch] for curve in curves] for epoch in epochs]
        axes.plot(epochs, [statistics.mean(v) for v in values], color=colours[name], lw=1.2)
        axes.fill_between(
            epochs, [min(v) for v in values], [max(v) for v in values], color=colours[name], alpha=0.2, lw=0
        )


def _bar(axes: Any, panel: Mapping[str, Any], groups: Runs, colours: Mapping[str, str], runs: Path) -> None:
    (metric,) = panel["metrics"]
    for place, (name, found) in enumerate(reversed([*groups.items()])):
        values = [record["metrics"][metric] for record in found if metric in record["metrics"]]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.barh(place, statistics.mean(values), xerr=spread, color=colours[name], height=0.7, capsize=2)
    axes.set_yticks([])


def _scatter(
    axes: Any, panel: Mapping[str, Any], groups: Runs, colours: Mapping[str, str], runs: Path
) -> None:
    x, y = (panel[key].removeprefix("summary:") for key in ("xAxis", "yAxis"))
    for name, found in groups.items():
        points = [r["metrics"] for r in found if {x, y} <= set(r["metrics"])]
        axes.plot([p[x] for p in points], [p[y] for p in points], "o", ms=4, color=colours[name])


DRAWN = {"Run History Line Plot": _line, "Bar Chart": _bar, "Scatter Plot": _scatter}
