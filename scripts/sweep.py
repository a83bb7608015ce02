"""Sweep settings of an experiment: one run for each combination and seed, a pool over the devices, what has a record is skipped.

    python scripts/sweep.py experiment=at/c100_basic_gkl loss.gamma=0,0.2,0.4 scale=smoke
    python scripts/sweep.py experiment=at/c100_basic_gkl loss.gamma=0.2,0.4 loss.alpha=12,20 'seeds=[0,1,2]' plan=true

Settings of configs/reproduce.yaml (seeds, scale, jobs, plan, ...) as there; everything else is handed to every run.
The paper's own sweeps are Tables X, XI, XII, XX and XXI: make sweep-alpha, sweep-beta, sweep-gamma, sweep-tau.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from gkl.records import read_records
from gkl.tables import build, markdown
from trainers.batch import carry_out, ended, read_settings, setting_of
from trainers.command import run_main
from trainers.configuration import ConfigError, choices, completed, completed_by
from trainers.plan import cells, usual


def main(arguments: list[str]) -> int:
    """Expand, plan, run, print. Returns the exit code."""
    settings, overrides = read_settings(arguments)
    experiment, swept, rest = read_sweep(overrides)
    points = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    rows = [
        {"id": ",".join(f"{k}={v}" for k, v in point.items()), "experiment": experiment, "overrides": point,
         "paper": {}, **{key: str(value) for key, value in point.items()}}
        for point in points
    ]  # fmt: skip
    table: dict[str, Any] = {
        "title": f"Sweep of {experiment} over {', '.join(swept)}", "target": "sweep", "name": "sweep", "rows": rows,
        "labels": {key: key for key in swept},
    }  # fmt: skip
    chosen = {key: settings[key] for key in ("scale", "protocol", "seeds", "rows")}
    plan = cells(table, **chosen, overrides=rest)
    attacked = plan[-1].config.get("evaluation")
    table["metrics"] = (
        {"clean": "Clean", "aa": "AA"} if attacked else {"top1_best": "Best epoch", "top1": "Last epoch"}
    )
    failures = carry_out(table, plan, settings)
    if failures is None:
        return 0
    scale, protocol = settings["scale"], settings["protocol"]
    built = build(
        table,
        read_records(Path(plan[0].config["paths"]["results"]) / "runs"),
        scale=scale,
        protocol=protocol,
        usual=usual(table, scale=scale, protocol=protocol),
        claims={experiment: points},
        setting=setting_of(rows, plan),
    )
    print("\n" + markdown(built))
    return ended(failures)


def read_sweep(overrides: list[str]) -> tuple[str, dict[str, list[Any]], list[str]]:
    """The experiment, each swept setting's values, and the overrides that are the same in all runs. Raises ConfigError."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"cannot read the overrides: {' '.join(str(error).split())}") from None
    experiments = [str(o.value()) for o in parsed if o.key_or_group == "experiment"]
    if len(experiments) == 1 and (group := completed_by(experiments[0])):
        raise ConfigError(
            f"a sweep names its experiment whole: experiment={experiments[0]}/{choices(group)[0]}, or another {group}"
        )
    stem = completed(experiments[0])[0].removeprefix("experiment=") if len(experiments) == 1 else None
    if stem not in choices("experiment"):
        raise ConfigError(f"a sweep needs one experiment=...; one of: {', '.join(choices('experiment'))}")
    swept: dict[str, list[Any]] = {}
    rest = []
    for override in parsed:
        if override.is_sweep_override():
            if "." not in override.key_or_group:
                raise ConfigError(
                    f"a sweep goes over settings such as loss.gamma, got {override.input_line!r}"
                )
            swept[override.key_or_group] = list(override.sweep_iterator())
        elif override.key_or_group != "experiment":
            rest.append(str(override.input_line))
    if not swept:
        raise ConfigError("nothing to sweep: give a setting several values, as in loss.gamma=0,0.2,0.4")
    return experiments[0], swept, rest


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
