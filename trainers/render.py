"""A table's files from its configuration and the records: a section per scale that has any, the paper's own first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gkl.records import Record
from gkl.tables import Table, build, latex, markdown
from trainers.folder import write_text
from trainers.plan import expected


def section(table: Mapping[str, Any], records: Sequence[Record], scale: str, protocol: str) -> Table:
    """The table of one scale and protocol."""
    identities = expected(table, scale=scale, protocol=protocol)
    return build(table, records, scale=scale, protocol=protocol, expected=identities)


def render(table: Mapping[str, Any], records: Sequence[Record], results: Path) -> list[Path]:
    """Write <results>/tables/<name>.md and .tex; returns their paths."""
    experiments = {row["experiment"] for row in table["rows"]}
    there = {(r["scale"], r["protocol"]) for r in records if r["experiment"] in experiments}
    order = [("paper", "official"), *sorted(there - {("paper", "official")})]
    built = [section(table, records, scale, protocol) for scale, protocol in order]
    head = "<!-- Written by scripts/reproduce.py from configs/table and results/runs; do not edit. -->\n\n"
    texts = {".md": head + "\n".join(map(markdown, built)), ".tex": "\n".join(map(latex, built))}
    paths = []
    for suffix, text in texts.items():
        path = results / "tables" / f"{table['name']}{suffix}"
        write_text(path, text)
        paths.append(path)
    return paths
