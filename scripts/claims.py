"""What the records say of the paper's claims (results/claims.md), and the runs that would say most a minute.

    python scripts/claims.py                                  # the page alone; runs nothing
    python scripts/claims.py plan=true scale=small            # the missing runs, the most telling a minute first
    python scripts/claims.py minutes=10 scale=small           # as many of them as fit, then the page
    python scripts/claims.py minutes=10 scale=small setting=at_5000 data.root=cifar10.zip

Settings that configs/reproduce.yaml does not know are handed to every run.
"""

import trainers.interrupt  # noqa: F401

import sys
from pathlib import Path

from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.files import write_text
from trainers.reports.ledger import counted, ledger, markdown
from trainers.reports.queue import fitting, queue
from trainers.runs.paths import folders
from trainers.runs.records import read_records
from trainers.runs.reproduce import carry_out, concurrent_runs, ended, read_settings


def main(arguments: list[str]) -> int:
    """Order, run, judge. Returns the exit code."""
    settings, overrides = read_settings(arguments)
    for name in ("table", "figure", "rows", "columns", "seeds", "trials"):
        if settings[name] is not None:
            raise ConfigError(f"claims have no {name}; make table3 ROWS=... SEEDS=... runs what you choose")
    results = Path(folders()["results"])
    records = read_records(results / "runs")
    failures: list[str] = []
    if settings["plan"] or settings["minutes"]:
        steps, unfit = queue(records, settings, overrides)
        print(f"{len(steps)} steps at scale={settings['scale']}, the most telling a minute first:")
        for number, step in enumerate(steps, 1):
            print(f"{number:4} {step}")
        for line in unfit:
            print(f"left out: {line}")
        if settings["plan"]:
            return ended(records.damaged)
        if steps:
            at_once = concurrent_runs(steps[0].cells[0].config, settings)
            cells = fitting(steps, settings["minutes"], at_once)
            table = {"title": f"The first of them, for {settings['minutes']:g} minutes", "name": "claims"}
            failures = carry_out(table, cells, settings) or []
            records = read_records(results / "runs")
    found = ledger(records)
    write_text(results / "claims.md", markdown(found))
    print(f"wrote {results / 'claims.md'}: {counted(found)}")
    return ended([*failures, *records.damaged])


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
