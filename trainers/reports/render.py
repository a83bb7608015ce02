"""Files of tables and figures from their configuration and the records: a section per scale and setting that has any."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.files import write_text
from trainers.reports.figures import write
from trainers.reports.tables import Table, build, latex, markdown, place, settings
from trainers.runs.plan import Overrides, claims, experiments
from trainers.runs.records import Record


def section(
    table: Mapping[str, Any],
    records: Sequence[Record],
    scale: str,
    protocol: str,
    setting: Overrides | None = None,
) -> Table:
    """The table of one scale, protocol and setting."""
    return build(
        table, records, scale=scale, protocol=protocol, setting=setting, claims=claims(),
    )  # fmt: skip


def sections(table: Mapping[str, Any], records: Sequence[Record]) -> list[Table]:
    """The paper's own scale, then every scale, protocol and setting of which there are records."""
    names = {name for row in table["rows"] for name in experiments(table, row).values()}
    there = {(r["scale"], r["protocol"]) for r in records if r["experiment"] in names}
    order = [("paper", "official"), *sorted(there - {("paper", "official")})]
    made, claimed = [], claims()
    for scale, protocol in order:
        placed = place(table, records, scale=scale, protocol=protocol, claims=claimed)
        plain = any(not own for runs in placed.values() for _, own in runs) or scale == "paper"
        for setting in [*([{}] if plain else []), *settings(placed)]:
            made.append(
                build(
                    table,
                    records,
                    scale=scale,
                    protocol=protocol,
                    setting=setting,
                    claims=claimed,
                )
            )
    return made


def render_figure(figure: Mapping[str, Any], records: Sequence[Record], results: Path) -> list[Path]:
    """Write <results>/figures/<name>-<scale>.png and .pdf for every section that can be drawn; returns their paths."""
    paths: list[Path] = []
    count: dict[str, int] = {}
    for built in sections(figure, records):
        stem = f"{figure['name']}-{built.scale}" + (
            "" if built.protocol == "official" else f"-{built.protocol}"
        )
        number = count.get(stem, 0) + 1
        named = stem if number == 1 else f"{stem}-{number}"
        if written := write(figure["draw"], built, results / "figures" / named):
            count[stem] = number
            paths += written
    return paths


def render(table: Mapping[str, Any], records: Sequence[Record], results: Path) -> list[Path]:
    """Write <results>/tables/<name>.md and .tex; returns their paths."""
    built = sections(table, records)
    head = "<!-- Written by scripts/reproduce.py from configs/table and results/runs; do not edit. -->\n\n"
    texts = {".md": head + "\n".join(map(markdown, built)), ".tex": "\n".join(map(latex, built))}
    paths = []
    for suffix, text in texts.items():
        path = results / "tables" / f"{table['name']}{suffix}"
        write_text(path, text)
        paths.append(path)
    return paths
