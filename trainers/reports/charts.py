"""The report page's charts as Vega-Lite, from tables and records; each is a specification with its values inside."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.reports import chart_forms as forms
from trainers.reports.chart_forms import Chart
from trainers.reports.dashboard import history
from trainers.reports.figures import as_number, shown_pictures
from trainers.reports.tables import Row, Table
from trainers.runs.records import Record

Values = list[dict[str, Any]]


def clean_against_aa(table: Table) -> list[Chart]:
    """Figure 1: the paper's points, and ours with their spread over seeds."""
    found = {"the paper's values": _paper_points(table), f"ours, scale {table.scale}": _our_points(table)}
    return [
        _chart(forms.points(), values, title, f"Clean accuracy against AutoAttack accuracy, {title}", 340)
        for title, values in found.items()
        if values
    ]


def _paper_points(table: Table) -> Values:
    return [
        {**_named(row), "clean": row.paper["clean"], "aa": row.paper["aa"], "status": "the paper's"}
        for row in table.rows
        if {"clean", "aa"} <= set(row.paper)
    ]


def _our_points(table: Table) -> Values:
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
    logged = {key for found in curves.values() for curve in found for key in curve[max(curve)]}
    form = forms.bands(list(curves))
    return [
        _chart(form, _means(curves, metric), metric, f"{metric} by epoch, mean and range over seeds", 220)
        for metric in sorted(logged)
        if metric.startswith(("test/", "train/"))
    ]


def _means(curves: Mapping[str, Sequence[Mapping[float, Mapping[str, float]]]], metric: str) -> Values:
    """A metric by group and epoch, of the epochs that all of a group's runs have."""
    values = []
    for name, found in curves.items():
        for epoch in sorted(set.intersection(*(set(curve) for curve in found))):
            seeds = [curve[epoch][metric] for curve in found if metric in curve[epoch]]
            if seeds:
                values.append(
                    {"row": name, "epoch": epoch, "seeds": len(seeds), "mean": round(statistics.mean(seeds), 3),
                     "low": round(min(seeds), 3), "high": round(max(seeds), 3)}
                )  # fmt: skip
    return values


def ablation(table: Table) -> list[Chart]:
    """Each metric over the swept value, ours with the standard deviation over seeds, the paper's dashed beside it."""
    charts = []
    across = table.labels[-1]
    for metric, title in list(table.metrics.items())[:2]:
        values = _swept(table, metric)
        for who in dict.fromkeys(value["who"] for value in values):
            mine = [value for value in values if value["who"] == who]
            names = list(dict.fromkeys(value["row"] for value in mine))
            form = forms.lines(across, f"{title} (%)", names, dashed=who == "paper")
            charts.append(_chart(form, mine, f"{title}: {who}", f"{title} over {across}, {who}", 200))
    return charts


def _swept(table: Table, metric: str) -> Values:
    """The paper's values of a metric and ours; the last label that is a number is a row's place on the axis."""
    values = []
    for row in table.rows:
        numbers = [(i, x) for i, text in enumerate(row.label) if (x := as_number(text)) is not None]
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
    return values


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
    names = [row.label[0] for row in table.rows[:2]]
    charts = []
    for seed in sorted(set(found[0]) & set(found[1])):
        pairs = zip(found[0][seed], found[1][seed], strict=True)
        values = [{"class": c, "difference": round(one - two, 4)} for c, (one, two) in enumerate(pairs)]
        values.sort(key=lambda value: value["difference"])
        title = f"{names[0]} minus {names[1]}, seed {seed}"
        charts.append(
            _chart(forms.signed_bars(), values, title, f"Difference of class margins, {title}", 220)
        )
    return charts


def class_scores(table: Table) -> list[Chart]:
    """Figure 3: each class's mean probability of the true class, sorted, coloured by how many training pictures it has."""
    charts = []
    for row in table.rows:
        for record in row.records:
            if "class_scores" not in record["assessments"]:
                continue
            details = record["assessments"]["class_scores"]["details"]
            pairs = zip(details["scores"], details["pictures"], strict=True)
            values = [{"class": c, "score": round(s, 4), "pictures": n} for c, (s, n) in enumerate(pairs)]
            values.sort(key=lambda value: -value["score"])
            title = f"{' '.join(row.label)}, seed {record['seed']}"
            charts.append(_chart(forms.score_bars(), values, title, f"Class scores, {title}", 220))
    return charts


def segmentations(table: Table) -> list[Chart]:
    """Test pictures, their truth, and what each row makes of them."""
    columns: list[tuple[str, str, list[dict[str, str]]]] = []
    for row in table.rows:
        if shown := shown_pictures(row):
            columns += [] if columns else [("input", "picture", shown), ("truth", "truth", shown)]
            columns.append((row.label[0], "predicted", shown))
    values = [
        {"column": name, "row": n, "url": f"data:image/png;base64,{one[key]}"}
        for name, key, shown in columns
        for n, one in enumerate(shown)
    ]
    if not values:
        return []
    title = f"scale {table.scale}"
    said = f"Test pictures, their truth and each method's segmentation, {title}"
    return [_chart(forms.pictures(), values, title, said, 30 + 100 * len({v["row"] for v in values}))]


def questions(table: Table) -> list[Chart]:
    """Questions about pictures, and what each row answers."""
    found = [(row, shown) for row in table.rows if (shown := shown_pictures(row))]
    if not found:
        return []
    first = found[0][1]
    columns = [("question", [one["question"] for one in first])]
    columns += [(row.label[0], [one["answer"] for one in shown]) for row, shown in found]
    values = [
        {"column": "picture", "row": n, "url": f"data:image/png;base64,{one['picture']}", "text": ""}
        for n, one in enumerate(first)
    ] + [
        {"column": name, "row": n, "text": text, "url": ""}
        for name, texts in columns
        for n, text in enumerate(texts)
    ]
    said = f"Questions about pictures and each method's answers, scale {table.scale}"
    return [_chart(forms.answers(), values, f"scale {table.scale}", said, 30 + 90 * len(first))]


def differences(values: Values) -> list[Chart]:
    """Paired differences with their intervals; each value: name, metric, mean, low, high, seeds."""
    description = "Paired differences over shared seeds with 95 % intervals"
    names = len({value["name"] for value in values})
    return [_chart(forms.intervals(), values, "paired differences", description, 60 + 26 * names)]


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
    description = f"Device hours of a run by row, scale {table.scale}"
    return [_chart(forms.hours(), values, f"scale {table.scale}", description, 40 + 22 * len(values))]


def _chart(form: Chart, values: Values, title: str, description: str, height: int) -> Chart:
    """A form with its values and what is said of them."""
    said = {"title": title, "description": description, "width": "container", "height": height}
    return {**form, **said, "data": {"values": values}}
