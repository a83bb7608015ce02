"""Sweep settings of an experiment: one run for each combination and seed, through a launcher; what has a record is skipped.

    python scripts/sweep.py experiment=at/c100_basic_gkl loss.gamma=0,0.2,0.4 scale=smoke
    python scripts/sweep.py experiment=at/c100_basic_gkl loss.gamma=0.2,0.4 loss.alpha=12,20 'seeds=[0,1,2]' plan=true
    python scripts/sweep.py experiment=at/c100_basic_gkl 'loss.gamma=interval(0,1)' 'loss.alpha=tag(log,interval(4,40))' trials=30

The last form looks for the front of clean and AutoAttack accuracy with Optuna, `trials` points, each over all seeds. Settings of
configs/reproduce.yaml (seeds, scale, jobs, plan, keep_going, ...) as there; everything else is handed to every run. Table and figures go
to results/sweeps. The paper's own sweeps are Tables X, XI, XII, XX and XXI: make sweep-alpha, sweep-beta, sweep-gamma, sweep-tau.
"""

import trainers.interrupt  # noqa: F401

import sys

from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.reports.sweep import write
from trainers.reports.tables import markdown
from trainers.runs.reproduce import carry_out, ended, read_settings
from trainers.runs.sweep import Search, planned, read_sweep


def main(arguments: list[str]) -> int:
    """Expand, plan, run, print. Returns the exit code."""
    settings, overrides = read_settings(arguments)
    for name in ("table", "figure", "rows", "columns"):
        if settings[name] is not None:
            raise ConfigError(f"a sweep has no {name}; name its experiment=... and the settings it goes over")
    sweep = read_sweep(overrides)
    if sweep.searched != (settings["trials"] is not None):
        raise ConfigError(
            "trials=... and settings with an interval(low,high) belong together: give both or neither"
        )
    if not sweep.searched:
        points = sweep.grid()
        plan = planned(sweep, points, settings)
        failures = carry_out(sweep.table([]), plan, settings)
    else:
        search = Search(sweep, settings)
        print(f"{len(search.points())} of {settings['trials']} points tried; a point's runs:")
        plan = search.usual if settings["plan"] else search.first()
        failures = carry_out(sweep.table([]), plan, settings, search.then)
        points = search.points()
    if failures is None or not points:
        return 0
    table, paths = write(sweep, points, planned(sweep, points, settings), settings)
    print("\n" + markdown(table))
    print("wrote " + " and ".join(map(str, paths)))
    return ended(failures)


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
