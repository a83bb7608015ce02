"""The report page's charts as Vega-Lite, made with Altair from tables and records; each is a specification with its data inside."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from trainers.reports.dashboard import history
from trainers.reports.figures import BLUE, RED
from trainers.reports.tables import Row, Table
from trainers.runs.records import Record

Chart = dict[str, Any]
GREEN, ORANGE, PINK, SKY = "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
KINDS = {"basic": GREEN, "AutoAugment": BLUE, "generated data": RED}
COLOURS = (RED, BLUE, GREEN, ORANGE, PINK, SKY)  # the baseline first, as in the figures


def clean_against_aa(table: Table) -> list[Chart]:
    """Figure 1: the paper's points, and ours with their spread over seeds."""
    charts = []
    for title, points in (
        ("the paper's values", _paper_points(table)),
        (f"ours, scale {table.scale}", _our_points(table)),
    ):
        if not points:
            continue
        tooltip = ["method:N", "kind:N", "clean:Q", "aa:Q", "seeds:Q", "status:N"]
        chart = (
            alt.Chart(alt.Data(values=points))
            .mark_point(filled=True, size=90, opacity=0.85)
            .encode(
                x=alt.X("clean:Q", title="clean accuracy (%)", scale=alt.Scale(zero=False, padding=20)),
                y=alt.Y("aa:Q", title="AutoAttack accuracy (%)", scale=alt.Scale(zero=False, padding=20)),
                color=alt.Color(
                    "kind:N", title=None, scale=alt.Scale(domain=list(KINDS), range=list(KINDS.values()))
                ),
                shape=alt.Shape(
                    "gkl:N",
                    title=None,
                    scale=alt.Scale(domain=["GKL-AT", "others"], range=["diamond", "circle"]),
                ),
                tooltip=tooltip,
            )
        )
        names = (
            alt.Chart(alt.Data(values=points))
            .mark_text(align="left", dx=8, dy=-6, fontSize=9)
            .encode(x="clean:Q", y="aa:Q", text="method:N", color=alt.value(NEUTRAL))
        )
        charts.append(
            _chart(chart + names, title, f"Clean accuracy against AutoAttack accuracy, {title}", 340)
        )
    return charts


NEUTRAL = "#808080"  # readable on light and dark


def _paper_points(table: Table) -> list[dict[str, Any]]:
    return [
        {**_named(row), "clean": row.paper["clean"], "aa": row.paper["aa"], "status": "the paper's"}
        for row in table.rows
        if {"clean", "aa"} <= set(row.paper)
    ]


def _our_points(table: Table) -> list[dict[str, Any]]:
    return [
        {
            **_named(row),
            **{name: round(statistics.mean(row.ours[name]), 2) for name in ("clean", "aa")},
            "seeds": len(row.ours["aa"]),
            "status": row.status,
        }
        for row in table.rows
        if row.ours.get("clean") and row.ours.get("aa")
    ]


def _named(row: Row) -> dict[str, str]:
    kind = row.label[-1]
    kind = "generated data" if "enerated" in kind else "AutoAugment" if "AutoAug" in kind else "basic"
    return {
        "method": row.label[0],
        "kind": kind,
        "gkl": "GKL-AT" if row.label[0].startswith("GKL") else "others",
    }


def learning_curves(groups: Mapping[str, Sequence[Record]], runs: Path) -> list[Chart]:
    """Accuracy by epoch of the runs of each group: mean, and the range over seeds as a band."""
    curves = {
        name: [{row["epoch"]: row for row in history(record, runs)} for record in found]
        for name, found in groups.items()
    }
    logged = dict.fromkeys(
        key
        for found in curves.values()
        for curve in found
        for key in curve[max(curve)]
        if key.startswith(("test/", "train/"))
    )
    logged = dict.fromkeys(sorted(logged))
    charts = []
    for metric in logged:
        values = []
        for name, found in curves.items():
            for epoch in sorted(set.intersection(*(set(curve) for curve in found))):
                seeds = [curve[epoch][metric] for curve in found if metric in curve[epoch]]
                if seeds:
                    values.append(
                        {"row": name, "epoch": epoch, "seeds": len(seeds), "mean": round(statistics.mean(seeds), 3),
                         "low": round(min(seeds), 3), "high": round(max(seeds), 3)}
                    )  # fmt: skip
        base = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X("epoch:Q", title="epoch"),
            color=alt.Color(
                "row:N",
                title=None,
                scale=_colours(list(curves)),
                legend=alt.Legend(orient="bottom", columns=1, labelLimit=400),
            ),
        )
        band = base.mark_area(opacity=0.2).encode(
            y=alt.Y("low:Q", title="%", scale=alt.Scale(zero=False)), y2="high:Q"
        )
        line = base.mark_line().encode(
            y=alt.Y("mean:Q", scale=alt.Scale(zero=False)),
            tooltip=["row:N", "epoch:Q", "mean:Q", "low:Q", "high:Q", "seeds:Q"],
        )
        charts.append(_chart(band + line, metric, f"{metric} by epoch, mean and range over seeds", 220))
    return charts


def _colours(names: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(names), range=[COLOURS[i % len(COLOURS)] for i in range(len(names))])


def ablation(table: Table) -> list[Chart]:
    """Each metric over the swept value, ours with the standard deviation over seeds, the paper's dashed beside it."""
    charts = []
    for metric, title in list(table.metrics.items())[:2]:
        values = []
        for row in table.rows:
            numbers = [(i, float(t)) for i, t in enumerate(row.label) if _is_number(t)]
            if not numbers:
                continue
            place, x = numbers[-1]
            name = ", ".join(t for i, t in enumerate(row.label) if i != place)
            if (paper := row.paper.get(metric)) is not None:
                values.append({"x": x, "y": paper, "low": paper, "high": paper, "who": "paper", "row": name})
            if ours := row.ours[metric]:
                mean, spread = statistics.mean(ours), statistics.stdev(ours) if len(ours) > 1 else 0.0
                values.append(
                    {"x": x, "y": round(mean, 2), "low": round(mean - spread, 2), "high": round(mean + spread, 2),
                     "who": f"ours, scale {table.scale}", "row": name, "seeds": len(ours)}
                )  # fmt: skip
        for who in dict.fromkeys(value["who"] for value in values):
            mine = [value for value in values if value["who"] == who]
            names = list(dict.fromkeys(str(value["row"]) for value in mine))
            base = alt.Chart(alt.Data(values=mine)).encode(
                x=alt.X("x:Q", title=table.labels[-1], scale=alt.Scale(zero=False, padding=10)),
                color=alt.Color(
                    "row:N",
                    title=None,
                    scale=_colours(names),
                    legend=alt.Legend() if len(names) > 1 else None,
                ),
            )
            line = base.mark_line(point=True, strokeDash=[4, 3] if who == "paper" else [1, 0]).encode(
                y=alt.Y("y:Q", title=f"{title} (%)", scale=alt.Scale(zero=False)),
                tooltip=["row:N", "x:Q", "y:Q", "seeds:Q", "who:N"],
            )
            bars = base.mark_rule().encode(y=alt.Y("low:Q", scale=alt.Scale(zero=False)), y2="high:Q")
            charts.append(
                _chart(line + bars, f"{title}: {who}", f"{title} over {table.labels[-1]}, {who}", 200)
            )
    return charts


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def margins(table: Table) -> list[Chart]:
    """Figure 4 (c): the class margins of the table's first row minus those of its second, sorted."""
    found = [
        {
            record["seed"]: record["assessments"]["structure"]["details"]["margins"]
            for record in row.records
            if "structure" in record["assessments"]
        }
        for row in table.rows[:2]
    ]
    charts = []
    for seed in sorted(set(found[0]) & set(found[1])):
        pairs = zip(found[0][seed], found[1][seed], strict=True)
        values = sorted(
            ({"class": c, "difference": round(one - two, 4)} for c, (one, two) in enumerate(pairs)),
            key=lambda value: float(value["difference"]),
        )
        names = [row.label[0] for row in table.rows[:2]]
        chart = (
            alt.Chart(alt.Data(values=values))
            .mark_bar()
            .encode(
                x=alt.X("class:N", sort=None, title="class, sorted"),
                y=alt.Y("difference:Q", title="difference of margins"),
                color=alt.condition("datum.difference > 0", alt.value(BLUE), alt.value(RED)),
                tooltip=["class:N", "difference:Q"],
            )
        )
        title = f"{names[0]} minus {names[1]}, seed {seed}"
        charts.append(_chart(chart, title, f"Difference of class margins, {title}", 220))
    return charts


def class_scores(table: Table) -> list[Chart]:
    """Figure 3: each class's mean probability of the true class, sorted, coloured by how many training pictures it has."""
    charts = []
    for row in table.rows:
        for record in row.records:
            if "class_scores" not in record["assessments"]:
                continue
            details = record["assessments"]["class_scores"]["details"]
            values = [
                {"class": c, "score": round(score, 4), "pictures": pictures}
                for c, (score, pictures) in enumerate(
                    zip(details["scores"], details["pictures"], strict=True)
                )
            ]
            chart = (
                alt.Chart(alt.Data(values=sorted(values, key=lambda value: -value["score"])))
                .mark_bar()
                .encode(
                    x=alt.X("class:N", sort=None, title="class, sorted"),
                    y=alt.Y("score:Q", title="mean probability", scale=alt.Scale(domain=[0, 1])),
                    color=alt.Color(
                        "pictures:Q", title="training pictures", scale=alt.Scale(scheme="viridis")
                    ),
                    tooltip=["class:N", "score:Q", "pictures:Q"],
                )
            )
            title = f"{' '.join(row.label)}, seed {record['seed']}"
            charts.append(_chart(chart, title, f"Class scores, {title}", 220))
    return charts


def differences(values: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Paired differences with their intervals; each value: name, metric, mean, low, high, seeds."""
    base = alt.Chart(alt.Data(values=[dict(value) for value in values])).encode(
        y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=280)), color=alt.Color("metric:N", title=None),
        yOffset="metric:N",
    )  # fmt: skip
    tooltip = ["name:N", "metric:N", "mean:Q", "low:Q", "high:Q", "seeds:Q"]
    chart = (
        base.mark_rule(strokeWidth=2).encode(
            x=alt.X("low:Q", title="points, 95 % interval"), x2="high:Q", tooltip=tooltip
        )
        + base.mark_point(filled=True, size=50).encode(x="mean:Q", tooltip=tooltip)
        + alt.Chart(alt.Data(values=[{}])).mark_rule(strokeDash=[3, 3], color=NEUTRAL).encode(x=alt.datum(0))
    )
    names = len({value["name"] for value in values})
    return [
        _chart(
            chart,
            "paired differences",
            "Paired differences over shared seeds with 95 % intervals",
            60 + 26 * names,
        )
    ]


def cost(table: Table) -> list[Chart]:
    """Device hours of each row's runs, training and evaluation together, on the machine that the tooltip names."""
    values = [
        {"row": " ".join(row.label), "hours": round(statistics.mean(r["cost"]["device_hours"] for r in row.records), 4),
         "memory": round(max(r["cost"]["peak_memory_bytes"] for r in row.records) / 2**30, 2), "seeds": len(row.records),
         "machine": "; ".join(sorted({f"{r['hardware']['count']} × {r['hardware']['name']}" for r in row.records}))}
        for row in table.rows
        if row.records
    ]  # fmt: skip
    if not values:
        return []
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(color=BLUE)
        .encode(
            x=alt.X("hours:Q", title="device hours a run"),
            y=alt.Y("row:N", sort=None, title=None, axis=alt.Axis(labelLimit=260)),
            tooltip=["row:N", "hours:Q", "memory:Q", "seeds:Q", "machine:N"],
        )
    )
    return [
        _chart(
            chart,
            f"scale {table.scale}",
            f"Device hours of a run by row, scale {table.scale}",
            40 + 22 * len(values),
        )
    ]


def _chart(chart: Any, title: str, description: str, height: int) -> Chart:
    made = chart.properties(title=title, description=description, width="container", height=height).to_dict()
    return {
        key: value for key, value in made.items() if key != "config"
    }  # the page has its own, for light and dark
