"""The forms of the report page's charts, made with Altair: Vega-Lite specifications without values, titles and sizes.

Each form is made once. Altair never sees values, of which it would check every row; the tests validate whole charts.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import altair as alt
from altair.utils.schemapi import debug_mode

from trainers.reports.figures import BLUE, RED

Chart = dict[str, Any]
GREEN, ORANGE, PINK, SKY = "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
NEUTRAL = "#808080"  # readable on light and on dark
KINDS = {"basic": GREEN, "AutoAugment": BLUE, "generated data": RED}
COLOURS = (RED, BLUE, GREEN, ORANGE, PINK, SKY)  # the baseline first, as in the figures
HERE = alt.NamedData("here")  # stands for a chart's values
unchecked = debug_mode(False)  # decorates: Altair would validate each part as it is made


@cache
@unchecked
def points() -> Chart:
    """Named points: clean and AutoAttack accuracy."""
    shapes = alt.Scale(domain=["GKL-AT", "others"], range=["diamond", "circle"])
    marks = (
        alt.Chart(HERE)
        .mark_point(filled=True, size=90, opacity=0.85)
        .encode(
            x=alt.X("clean:Q", title="clean accuracy (%)", scale=alt.Scale(zero=False, padding=20)),
            y=alt.Y("aa:Q", title="AutoAttack accuracy (%)", scale=alt.Scale(zero=False, padding=20)),
            color=alt.Color("kind:N", title=None, scale=_scale(KINDS)),
            shape=alt.Shape("gkl:N", title=None, scale=shapes),
            tooltip=_tooltip("method:N", "kind:N", "clean:Q", "aa:Q", "seeds:Q", "status:N"),
        )
    )
    names = (
        alt.Chart(HERE)
        .mark_text(align="left", dx=8, dy=-6, fontSize=9)
        .encode(x=alt.X("clean:Q"), y=alt.Y("aa:Q"), text=alt.Text("method:N"), color=alt.value(NEUTRAL))
    )
    return _form(marks + names)


@unchecked
def bands(names: Sequence[str]) -> Chart:
    """A line by epoch with a band around it for each name."""
    legend = alt.Legend(orient="bottom", columns=1, labelLimit=400)
    base = alt.Chart(HERE).encode(
        x=alt.X("epoch:Q", title="epoch"),
        color=alt.Color("row:N", title=None, scale=_colours(names), legend=legend),
    )
    band = base.mark_area(opacity=0.2).encode(
        y=alt.Y("low:Q", title="%", scale=alt.Scale(zero=False)), y2=alt.Y2("high:Q")
    )
    line = base.mark_line().encode(
        y=alt.Y("mean:Q", scale=alt.Scale(zero=False)),
        tooltip=_tooltip("row:N", "epoch:Q", "mean:Q", "low:Q", "high:Q", "seeds:Q"),
    )
    return _form(band + line)


@unchecked
def lines(across: str, up: str, names: Sequence[str], dashed: bool) -> Chart:
    """A line over a swept setting with a bar at each value, for each name; across, up: titles of the axes."""
    legend = alt.Legend() if len(names) > 1 else None
    base = alt.Chart(HERE).encode(
        x=alt.X("x:Q", title=across, scale=alt.Scale(zero=False, padding=10)),
        color=alt.Color("row:N", title=None, scale=_colours(names), legend=legend),
    )
    line = base.mark_line(point=True, strokeDash=[4, 3] if dashed else [1, 0]).encode(
        y=alt.Y("y:Q", title=up, scale=alt.Scale(zero=False)),
        tooltip=_tooltip("row:N", "x:Q", "y:Q", "seeds:Q", "who:N"),
    )
    bars = base.mark_rule().encode(y=alt.Y("low:Q", scale=alt.Scale(zero=False)), y2=alt.Y2("high:Q"))
    return _form(line + bars)


@cache
@unchecked
def signed_bars() -> Chart:
    """A bar for each class, coloured by its sign."""
    chart = alt.Chart(HERE).mark_bar()
    return _form(
        chart.encode(
            x=alt.X("class:N", sort=None, title="class, sorted"),
            y=alt.Y("difference:Q", title="difference of margins"),
            color=alt.condition("datum.difference > 0", alt.value(BLUE), alt.value(RED)),
            tooltip=_tooltip("class:N", "difference:Q"),
        )
    )


@cache
@unchecked
def score_bars() -> Chart:
    """A bar for each class, coloured by its number of pictures."""
    chart = alt.Chart(HERE).mark_bar()
    return _form(
        chart.encode(
            x=alt.X("class:N", sort=None, title="class, sorted"),
            y=alt.Y("score:Q", title="mean probability", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("pictures:Q", title="training pictures", scale=alt.Scale(scheme="viridis")),
            tooltip=_tooltip("class:N", "score:Q", "pictures:Q"),
        )
    )


@cache
@unchecked
def intervals() -> Chart:
    """A mean with its interval for each name and metric, and where zero is."""
    base = alt.Chart(HERE).encode(
        y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=280)),
        color=alt.Color("metric:N", title=None),
        yOffset=alt.YOffset("metric:N"),
    )
    tooltip = _tooltip("name:N", "metric:N", "mean:Q", "low:Q", "high:Q", "seeds:Q")
    across = alt.X("low:Q", title="points, 95 % interval")
    zero = alt.Chart(alt.Data(values=[{}])).mark_rule(strokeDash=[3, 3], color=NEUTRAL)
    return _form(
        base.mark_rule(strokeWidth=2).encode(x=across, x2=alt.X2("high:Q"), tooltip=tooltip)
        + base.mark_point(filled=True, size=50).encode(x=alt.X("mean:Q"), tooltip=tooltip)
        + zero.encode(x=alt.datum(0))
    )


@cache
@unchecked
def hours() -> Chart:
    """A bar of device hours for each row."""
    chart = alt.Chart(HERE).mark_bar(color=BLUE)
    return _form(
        chart.encode(
            x=alt.X("hours:Q", title="device hours a run"),
            y=alt.Y("row:N", sort=None, title=None, axis=alt.Axis(labelLimit=260)),
            tooltip=_tooltip("row:N", "hours:Q", "memory:Q", "seeds:Q", "machine:N"),
        )
    )


@cache
@unchecked
def pictures() -> Chart:
    """Pictures in rows and columns."""
    return _form(
        alt.Chart(HERE)
        .mark_image(width=96, height=96)
        .encode(
            x=alt.X(
                "column:N",
                sort=None,
                title=None,
                axis=alt.Axis(orient="top", labelAngle=0, domain=False, ticks=False),
            ),
            y=alt.Y("row:N", sort=None, title=None, axis=None),
            url=alt.Url("url:N"),
            tooltip=_tooltip("column:N"),
        )
    )


@cache
@unchecked
def answers() -> Chart:
    """Pictures in the first column, words in the others."""
    places = {
        "x": alt.X(
            "column:N",
            sort=None,
            title=None,
            axis=alt.Axis(orient="top", labelAngle=0, domain=False, ticks=False),
        ),
        "y": alt.Y("row:N", sort=None, title=None, axis=None),
    }
    pictures = alt.Chart(HERE).mark_image(width=64, height=64).encode(**places, url=alt.Url("url:N"))
    words = (
        alt.Chart(HERE)
        .mark_text(lineBreak="\n", fontSize=10)
        .encode(**places, text=alt.Text("text:N"), tooltip=_tooltip("column:N", "text:N"))
    )
    return _form(alt.layer(pictures, words))


def _scale(colours: Mapping[str, str]) -> alt.Scale:
    return alt.Scale(domain=list(colours), range=list(colours.values()))


def _colours(names: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(names), range=[COLOURS[i % len(COLOURS)] for i in range(len(names))])


def _tooltip(*fields: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(field) for field in fields]


def _form(chart: Any) -> Chart:
    """A chart's specification, without Altair's colours: the page has its own, for light and dark."""
    return {key: value for key, value in chart.to_dict(validate=False).items() if key != "config"}
