"""Everything the records say: every table (Markdown, LaTeX), figure (PNG, PDF) and one web page, results/report.html.

    python scripts/report.py             # tables, figures and the page
    python scripts/report.py page        # the page alone

Nothing is run. The page needs no server and no other file; its numbers link to the records beside it.
"""

import trainers.interrupt  # noqa: F401

import sys
from pathlib import Path

from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.files import write_text
from trainers.reports.ledger import counted, ledger, markdown
from trainers.reports.page import page
from trainers.reports.render import render, render_figure
from trainers.runs.paths import folders
from trainers.runs.plan import load_table, tables
from trainers.runs.records import read_records
from trainers.runs.reproduce import ended


def main(arguments: list[str]) -> int:
    """Read, render, write. Returns the exit code."""
    if arguments not in ([], ["page"]):
        raise ConfigError(f"a report takes no settings but `page`, got {' '.join(arguments)}")
    results = Path(folders()["results"])
    records = read_records(results / "runs")
    if not records:
        raise ConfigError(
            f"there are no records in {results / 'runs'}; first: make table3 SCALE=smoke, or another table"
        )
    if not arguments:
        for kind in ("table", "figure"):
            for number in tables(kind):
                config = load_table(number, kind)
                written = render(config, records, results) if kind == "table" else []
                if "draw" in config:
                    written += render_figure(config, records, results)
                print("wrote " + ", ".join(map(str, written)))
    claims = ledger(records)
    if not arguments:
        write_text(results / "claims.md", markdown(claims))
        print(f"wrote {results / 'claims.md'}: {counted(claims)}")
    path = results / "report.html"
    write_text(path, page(records, results, claims))
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return ended(records.damaged)


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
