"""Reproduce a table or figure: list its runs, skip what is done, run what is missing, render it.

    python scripts/reproduce.py table=3 scale=smoke
    python scripts/reproduce.py figure=4 scale=smoke
    python scripts/reproduce.py table=3 plan=true                      # what is missing and what it costs
    python scripts/reproduce.py table=3 scale=small seeds=[0,1] rows=[gkl_basic,kl_basic] data=image_folder data.root=...

Settings that configs/reproduce.yaml does not know are handed to every run.
"""

import trainers.interrupt  # noqa: F401

import sys
from pathlib import Path

from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.reports.render import render, render_figure, section
from trainers.reports.tables import markdown
from trainers.runs.paths import folders
from trainers.runs.plan import cells, load_table, tables
from trainers.runs.records import read_records
from trainers.runs.reproduce import carry_out, damaged, ended, read_settings, setting_of


def main(arguments: list[str]) -> int:
    """Plan, run, render. Returns the exit code."""
    settings, overrides = read_settings(arguments)
    if (settings["table"] is None) == (settings["figure"] is None):
        raise ConfigError(
            f"name one table=... of {', '.join(tables())} or one figure=... of {', '.join(tables('figure'))}"
        )
    kind = "figure" if settings["figure"] is not None else "table"
    table = load_table(settings[kind], kind)
    chosen = {key: settings[key] for key in ("scale", "protocol", "seeds", "rows", "columns")}
    plan = cells(table, **chosen, overrides=overrides)
    unread = damaged(plan)
    failures = carry_out(table, plan, settings)
    if failures is None:
        return ended(unread)
    results = Path(folders()["results"])
    records = read_records(results / "runs")
    if kind == "figure":
        written = render_figure(table, records, results)
    else:
        setting = setting_of(table["rows"], plan)
        print("\n" + markdown(section(table, records, settings["scale"], settings["protocol"], setting)))
        written = render(table, records, results)
        if "draw" in table:
            written += render_figure(table, records, results)
    print("wrote " + " and ".join(map(str, written)) if written else "nothing to draw from yet")
    return ended([*failures, *records.damaged])


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
