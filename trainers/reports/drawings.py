"""The paper's figures drawn with matplotlib, each from a built table; trainers.reports.figures writes them.

Colours are told apart in print, too: by marker and position as well as by hue (Okabe & Ito's palette).
"""

import base64
import statistics
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from trainers.reports.ablation import ablation
from trainers.reports.figures import BLACK, BLUE, RED, provenance, shown_pictures
from trainers.reports.gradient_paths import gradient_paths
from trainers.reports.tables import Row, Table

CLASS_COLOURS = "tab20"


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


def _details(row: Row, assessment: str) -> Any:
    """What an assessment measured beside metrics, of the row's lowest seed that has it; None for none."""
    runs = sorted((r for r in row.records if assessment in r["assessments"]), key=lambda r: int(r["seed"]))
    return runs[0]["assessments"][assessment]["details"] if runs else None


def segmentations(table: Table) -> Figure | None:
    """Test pictures, their truth, and what each row's run of the lowest seed makes of them, a column each."""
    found = [(row, shown) for row in table.rows if (shown := shown_pictures(row))]
    if not found:
        return None
    first = found[0][1]
    columns = [("input", [one["picture"] for one in first]), ("truth", [one["truth"] for one in first])]
    columns += [("\n".join(row.label), [one["predicted"] for one in shown]) for row, shown in found]
    figure = Figure(figsize=(1.75 * len(columns), 1.65 * len(first) + 0.9), layout="constrained")
    panels = figure.subplots(len(first), len(columns), squeeze=False)
    for across, (title, pictures) in enumerate(columns):
        panels[0][across].set_title(title, fontsize=8)
        for down, png in enumerate(pictures):
            with Image.open(BytesIO(base64.b64decode(png))) as picture:
                panels[down][across].imshow(picture.convert("RGB"), interpolation="nearest")
            panels[down][across].axis("off")
    figure.suptitle(f"{table.title}\n{provenance(table)}; white: ignored", fontsize=9)
    return figure


def questions(table: Table) -> Figure | None:
    """Questions about pictures, and what each row's run of the lowest seed answers; Chinese ones, for which fonts lack, are on the page."""
    found = [
        (row, [one for one in shown if one["question"].isascii()])
        for row in table.rows
        if (shown := shown_pictures(row))
    ]
    if not found:
        return None
    first = found[0][1]
    figure = Figure(figsize=(9.0, 1.05 * len(first) + 0.9), layout="constrained")
    panels = figure.subplots(len(first), 2, squeeze=False, width_ratios=[1, 7])
    for number, (picture, text) in enumerate(panels):
        with Image.open(BytesIO(base64.b64decode(first[number]["picture"]))) as seen:
            picture.imshow(seen.convert("RGB"), interpolation="nearest")
        given = "\n".join(f"{' '.join(row.label)}: {shown[number]['answer']}" for row, shown in found)
        text.text(0.0, 0.5, first[number]["question"], fontsize=7, va="center", wrap=True)
        text.text(0.62, 0.5, given, fontsize=8, va="center")
        for panel in (picture, text):
            panel.axis("off")
    figure.suptitle(f"{table.title}\n{provenance(table)}", fontsize=9)
    return figure


DRAWINGS: dict[str, Callable[[Table], Figure | None]] = {
    "clean_against_aa": clean_against_aa,
    "structure": structure,
    "class_scores": class_scores,
    "ablation": ablation,
    "segmentations": segmentations,
    "questions": questions,
    "gradient_paths": gradient_paths,
}
