"""What swept settings do, drawn with matplotlib: curves over one setting, a heat map over two, and which values surpass the others."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from trainers.reports.figures import BLACK, BLUE, RED, as_number, pareto_front, provenance
from trainers.reports.tables import Row, Table

Values = Mapping[str, Sequence[float]]  # metric -> one value a seed


def ablation(table: Table) -> Figure | None:
    """What swept settings do: each metric over the setting, or over two of them; and the first two metrics against each other.

    The paper's values, where the table has any, stand in a row of their own above ours. The last label that is a number in a
    row is its place on the axis; a line joins the rows whose other labels agree. With two numbers: a heat map of the grid.
    """
    if not any(row.records for row in table.rows):
        return None
    ours: Mapping[str, Values] = {row.id: row.ours for row in table.rows}
    found = [("ours, " + provenance(table).removeprefix("ours, "), ours)]
    if any(row.paper for row in table.rows):
        paper = {row.id: {k: [v] for k, v in row.paper.items() if v is not None} for row in table.rows}
        found.insert(0, ("the paper's values", paper))
    metrics = list(table.metrics.items())[:2]
    axes_count = len(metrics) + (len(metrics) > 1)
    figure = Figure(figsize=(3.7 * axes_count, 3.6 * len(found)), layout="constrained")
    for part, (title, values) in zip(figure.subfigures(len(found), squeeze=False)[:, 0], found, strict=True):
        part.suptitle(title, fontsize=9)
        panels = part.subplots(1, axes_count, squeeze=False)[0]
        rows = [row for row in table.rows if values[row.id].get(metrics[0][0])]
        numbers = {row.id: [x for x in map(as_number, row.label) if x is not None] for row in rows}
        for axes, metric in zip(panels, metrics, strict=False):
            if rows and all(len(n) == 2 for n in numbers.values()):
                _heat_map(axes, table, rows, numbers, values, metric[0])
            else:
                _curves(axes, table, [row for row in rows if numbers[row.id]], values, metric[0])
            axes.set_title(metric[1], fontsize=9)
        if len(metrics) > 1:
            _front(panels[-1], table, rows, values, metrics)
    figure.suptitle(table.title, fontsize=10, fontweight="bold")
    return figure


def _curves(axes: Any, table: Table, rows: Sequence[Row], values: Mapping[str, Values], metric: str) -> None:
    series: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for row in rows:
        place = max(i for i, text in enumerate(row.label) if as_number(text) is not None)
        name = ", ".join(text for i, text in enumerate(row.label) if i != place)
        if numbers := values[row.id].get(metric):
            series.setdefault(name, []).append((float(row.label[place]), numbers))
            axes.set_xlabel(table.labels[place])
    for colour, marker, (name, points) in zip((BLUE, RED, BLACK), "osD", series.items(), strict=False):
        points.sort(key=lambda point: point[0])
        axes.errorbar(
            [x for x, _ in points],
            [statistics.mean(y) for _, y in points],
            yerr=[statistics.stdev(y) if len(y) > 1 else 0.0 for _, y in points],
            color=colour, marker=marker, ms=5, capsize=3, label=name,
        )  # fmt: skip
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)
    axes.set_ylabel("%")
    axes.grid(alpha=0.25)


def _heat_map(
    axes: Any,
    table: Table,
    rows: Sequence[Row],
    numbers: Mapping[str, Sequence[float]],
    values: Mapping[str, Values],
    metric: str,
) -> None:
    """The grid of two settings with its means written in; points beside a grid as coloured dots."""
    across, down = (sorted({n[k] for n in numbers.values()}) for k in (0, 1))
    means = {tuple(numbers[row.id]): statistics.mean(values[row.id][metric]) for row in rows}
    places = [i for i, text in enumerate(rows[0].label) if as_number(text) is not None]
    axes.set(xlabel=table.labels[places[0]], ylabel=table.labels[places[1]])
    if len(means) < len(across) * len(down):
        dots = axes.scatter(
            [x for x, _ in means], [y for _, y in means], c=[*means.values()], cmap="viridis", s=60
        )
        axes.figure.colorbar(dots, ax=axes)
        return
    image = axes.imshow(
        [[means[x, y] for x in across] for y in down], cmap="viridis", origin="lower", aspect="auto"
    )
    axes.set_xticks(range(len(across)), [f"{x:g}" for x in across])
    axes.set_yticks(range(len(down)), [f"{y:g}" for y in down])
    middle = (min(means.values()) + max(means.values())) / 2
    for (x, y), mean in means.items():
        axes.text(
            across.index(x), down.index(y), f"{mean:.1f}", ha="center", va="center", fontsize=8,
            color="white" if mean < middle else "black",
        )  # fmt: skip
    axes.figure.colorbar(image, ax=axes)


def _front(
    axes: Any,
    table: Table,
    rows: Sequence[Row],
    values: Mapping[str, Values],
    metrics: Sequence[tuple[str, str]],
) -> None:
    """Both metrics of each row, and a line along those that no other row surpasses in both."""
    (one, first), (two, second) = metrics
    points = {
        row.id: (statistics.mean(values[row.id][one]), statistics.mean(values[row.id][two]))
        for row in rows
        if values[row.id].get(two)
    }
    front = pareto_front(points)
    here: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        if row.id in points:
            best = row.id in front
            axes.plot(*points[row.id], "o", ms=6, color=BLUE if best else "none", markeredgecolor=BLUE)
            if best or as_number(row.label[-1]) is None:
                here.setdefault(points[row.id], []).append(", ".join(t for t in row.label if t != "–"))
    for place, names in here.items():
        axes.annotate("\n".join(names), place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    line = sorted(points[name] for name in front)
    axes.plot([x for x, _ in line], [y for _, y in line], color=BLUE, lw=0.8, alpha=0.6)
    axes.set(xlabel=f"{first} (%)", ylabel=f"{second} (%)")
    axes.set_title("filled: surpassed by none in both", fontsize=9)
    axes.margins(0.2)
    axes.grid(alpha=0.25)
