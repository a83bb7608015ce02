"""The paper's figures from the same rows and records as its tables.

    figure = draw("clean_against_aa", table)        # table: trainers.reports.tables.build(...)
    save(figure, Path("figure1.pdf"), "pdf")

Colours are told apart in print, too: by marker and position as well as by hue (Okabe & Ito's palette).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trainers.reports.tables import Row, Table

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 160},
    "pdf": {"metadata": {"CreationDate": None}},  # the same records give the same bytes
}
BLACK, BLUE, RED = "#000000", "#0072B2", "#D55E00"
CLASS_COLOURS = "tab20"


def draw(name: str, table: Table) -> Figure | None:
    """The figure of that name in DRAWINGS, or None where the table's rows have no records it could be drawn from."""
    if name not in DRAWINGS:
        raise ValueError(f"figures are {', '.join(DRAWINGS)}, got {name!r}")
    with matplotlib.rc_context(STYLE):
        return DRAWINGS[name](table)


def save(figure: Figure, path: Path, kind: str) -> None:
    """Write a figure as one of FORMATS."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format=kind, **FORMATS[kind])
        figure.set_layout_engine("none")  # laid out once: the next format finds everything in its place


def clean_against_aa(table: Table) -> Figure | None:
    """Figure 1: clean accuracy against AutoAttack, the paper's values beside ours. Stars are GKL-AT."""
    if not any(row.records for row in table.rows):
        return None
    figure = Figure(figsize=(10.8, 4.6), layout="constrained")
    left, right, key = figure.subplots(1, 3, width_ratios=(1, 1, 0.55))
    number = {row.id: n for n, row in enumerate(table.rows, 1)}
    printed = [
        (number[row.id], row, row.paper["clean"], row.paper["aa"])
        for row in table.rows
        if len(row.paper) >= 2
    ]
    ours = [
        (number[row.id], row, statistics.mean(row.ours["clean"]), statistics.mean(row.ours["aa"]))
        for row in table.rows
        if row.ours["clean"] and row.ours["aa"]
    ]
    _scatter(left, printed, "the paper's values")
    _scatter(right, ours, provenance(table))
    key.axis("off")
    for row in table.rows:
        where = (0.02, 1.0 - 0.074 * number[row.id])
        augmentation = "" if row.label[-1] == "Basic" else f", {row.label[-1]}"
        key.text(
            *where,
            f"{number[row.id]:2d}  {row.label[0]}{augmentation}",
            fontsize=8,
            color=_colour(row),
            va="center",
        )
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=label)
        for marker, colour, label in (
            ("*", "grey", "GKL-AT"),
            ("o", "grey", "other methods"),
            ("s", BLACK, "basic augmentation"),
            ("s", BLUE, "AutoAugment"),
            ("s", RED, "generated data"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(table.title)
    return figure


def _colour(row: Row) -> str:
    kind = row.label[-1]
    return BLUE if "AutoAug" in kind else RED if "enerated" in kind else BLACK


def _scatter(axes: Any, points: Sequence[tuple[int, Row, Any, Any]], title: str) -> None:
    """Numbered points; rows on one spot share their label."""
    here: dict[tuple[float, float], list[str]] = {}
    for number, row, clean, aa in points:
        star = row.label[0].startswith("GKL")
        axes.plot(
            clean, aa, marker="*" if star else "o", ms=11 if star else 6, color=_colour(row), ls="", alpha=0.9
        )
        here.setdefault((clean, aa), []).append(str(number))
    for place, numbers in here.items():
        axes.annotate(", ".join(numbers), place, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.margins(0.12)
    axes.set(xlabel="clean accuracy (%)", ylabel="AutoAttack accuracy (%)")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)


def structure(table: Table) -> Figure | None:
    """Figure 4: t-SNE of natural and adversarial features of two methods, and the difference of their class margins.

    The first two rows of the table, over the lowest seed that both have; the second row's margins are subtracted.
    """
    pair = table.rows[:2]
    found = [{r["seed"]: r for r in row.records if "structure" in r["assessments"]} for row in pair]
    seeds = sorted(set(found[0]) & set(found[1]))
    if not seeds:
        return None
    details = [runs[seeds[0]]["assessments"]["structure"]["details"] for runs in found]
    figure = Figure(figsize=(10.8, 3.9), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, letter, row, shown in zip(panels[:2], "ab", pair, details, strict=True):
        colours = {label: n for n, label in enumerate(shown["classes"])}
        for adversarial, marker in ((0, "o"), (1, "x")):
            points = [p for p in shown["points"] if p[3] == adversarial]
            axes.scatter(
                [p[0] for p in points],
                [p[1] for p in points],
                c=[colours[p[2]] for p in points],
                cmap=CLASS_COLOURS,
                vmin=0,
                vmax=19,
                marker=marker,
                s=9 if marker == "o" else 12,
                linewidths=0.6,
                alpha=0.8,
            )
        axes.set_title(f"({letter}) {row.label[0]}: t-SNE of features", fontsize=9)
        axes.set(xticks=[], yticks=[])
    handles = [
        Line2D([], [], linestyle="", marker=marker, color="grey", label=label)
        for marker, label in (("o", "natural"), ("x", "adversarial; colours: classes"))
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    difference = sorted(one - two for one, two in zip(*(d["margins"] for d in details), strict=True))
    positive = sum(d > 0 for d in difference)
    panels[2].bar(
        range(len(difference)), difference, color=[BLUE if d > 0 else RED for d in difference], width=0.85
    )
    panels[2].axhline(0, color="black", linewidth=0.6)
    panels[2].set(xlabel="classes, sorted", ylabel="margin difference", xticks=[])
    panels[2].set_title(
        f"(c) {pair[0].label[0]} minus {pair[1].label[0]}:\n{positive} of {len(difference)} classes positive",
        fontsize=9,
    )
    status = next(row.status for row in pair if row.records)
    figure.suptitle(f"{table.title}\nours, scale {table.scale}, seed {seeds[0]}; {status}", fontsize=10)
    return figure


SHOTS = {"many": BLUE, "medium": "#009E73", "few": RED}


def class_scores(table: Table) -> Figure | None:
    """Figure 3: each class's mean score, sorted; of the long-tailed data set coloured by how many pictures a class has.

    One panel for each row with records, over its lowest seed.
    """
    found = [(row, _details(row, "class_scores")) for row in table.rows]
    if not any(details for _, details in found):
        return None
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, letter, (row, details) in zip(panels, "abcdef", found, strict=False):
        axes.set_title(f"({letter}) {row.label[-1]}: {row.label[0]}\n{row.status}", fontsize=9)
        axes.set(xlabel="classes, sorted by score", ylim=(0, 1), xticks=[])
        if details is None:
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
            continue
        counts, scores = details["pictures"], details["scores"]
        order = sorted(range(len(scores)), key=[-s for s in scores].__getitem__)
        bounds = details.get("shots") or ([100, 20] if max(counts) > 2 * min(counts) else None)
        colours = [
            SHOTS["many" if counts[c] > bounds[0] else "few" if counts[c] < bounds[1] else "medium"]
            if bounds
            else BLACK
            for c in order
        ]
        axes.bar(
            range(len(order)),
            [scores[c] for c in order],
            color=colours,
            width=1.0 if len(order) > 50 else 0.85,
        )
        mean = statistics.mean(scores)
        axes.axhline(mean, color="grey", linewidth=0.8, linestyle="--")
        axes.text(len(order) - 0.5, mean + 0.02, f"mean {mean:.2f}", ha="right", fontsize=8, color="grey")
    panels[0].set_ylabel("mean probability of the true class")
    handles = [
        Line2D([], [], linestyle="", marker="s", color=colour, label=name) for name, colour in SHOTS.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False,
        title="training pictures of a class: many > 100, few < 20", title_fontsize=8, fontsize=8,
    )  # fmt: skip
    figure.suptitle(f"{table.title}\nours, scale {table.scale}", fontsize=10)
    return figure


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
        numbers = {row.id: [x for x in map(_as_number, row.label) if x is not None] for row in rows}
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


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _curves(axes: Any, table: Table, rows: Sequence[Row], values: Mapping[str, Values], metric: str) -> None:
    series: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for row in rows:
        place = max(i for i, text in enumerate(row.label) if _as_number(text) is not None)
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
    places = [i for i, text in enumerate(rows[0].label) if _as_number(text) is not None]
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
            if best or _as_number(row.label[-1]) is None:
                here.setdefault(points[row.id], []).append(", ".join(t for t in row.label if t != "–"))
    for place, names in here.items():
        axes.annotate("\n".join(names), place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    line = sorted(points[name] for name in front)
    axes.plot([x for x, _ in line], [y for _, y in line], color=BLUE, lw=0.8, alpha=0.6)
    axes.set(xlabel=f"{first} (%)", ylabel=f"{second} (%)")
    axes.set_title("filled: surpassed by none in both", fontsize=9)
    axes.margins(0.2)
    axes.grid(alpha=0.25)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names of those points that no other surpasses in one coordinate without falling behind in the other."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    }


def _details(row: Row, assessment: str) -> Any:
    """What an assessment measured beside metrics, of the row's lowest seed that has it; None for none."""
    runs = sorted((r for r in row.records if assessment in r["assessments"]), key=lambda r: int(r["seed"]))
    return runs[0]["assessments"][assessment]["details"] if runs else None


def provenance(table: Table) -> str:
    """What ours stand for, from the status of the first row that has any."""
    status = next(row.status for row in table.rows if row.records)
    seeds = sorted({len({r["seed"] for r in row.records}) for row in table.rows if row.records})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    what = f"ours, scale {table.scale}, {count} seed{'s' if seeds[-1] > 1 else ''}\n{status}"
    return what + (f"\n{table.setting}" if table.setting else "")


DRAWINGS: dict[str, Callable[[Table], Figure | None]] = {
    "clean_against_aa": clean_against_aa,
    "structure": structure,
    "class_scores": class_scores,
    "ablation": ablation,
}
