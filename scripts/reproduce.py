"""Reproduce a table or figure: list its runs, skip what is done, run what is missing, render it.

    python scripts/reproduce.py table=3 scale=smoke
    python scripts/reproduce.py figure=4 scale=smoke
    python scripts/reproduce.py table=3 plan=true                      # what is missing and what it costs
    python scripts/reproduce.py table=3 scale=small seeds=[0,1] rows=[gkl_basic,kl_basic] data=image_folder data.root=...

Settings that configs/reproduce.yaml does not know are handed to every run.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gkl.records import differences, read_records
from gkl.tables import markdown
from trainers.command import run_main
from trainers.configuration import CONFIGS, ConfigError, check, check_machine, choices, unknown
from trainers.launch import default_jobs, run_all
from trainers.plan import Cell, cells, load_table, row_config, summary, tables
from trainers.render import render, render_figure, section


def main(arguments: list[str]) -> int:
    """Plan, run, render. Returns the exit code."""
    settings, overrides = read_settings(arguments)
    kind = "figure" if settings["figure"] is not None else "table"
    table = load_table(settings[kind], kind)
    plan = cells(
        table,
        scale=settings["scale"],
        protocol=settings["protocol"],
        seeds=settings["seeds"],
        rows=settings["rows"],
        overrides=overrides,
    )
    missing = [cell for cell in plan if cell.status != "done"]
    print(summary(table["title"], settings["scale"], plan, settings["tflops"]), flush=True)
    if settings["plan"]:
        return 0
    for cell in missing:
        check(cell.config, cell.config["devices"])
    if missing:
        check_machine(missing[0].config)
        jobs = default_jobs(missing[0].config["devices"]) if settings["jobs"] == "auto" else settings["jobs"]
        run_all(missing, jobs)
    results = Path(plan[0].config["paths"]["results"])
    records = read_records(results / "runs")
    if kind == "figure":
        written = render_figure(table, records, results)
    else:
        shown = section(table, records, settings["scale"], settings["protocol"], setting_of(table, plan))
        print("\n" + markdown(shown))
        written = render(table, records, results)
    print("wrote " + " and ".join(map(str, written)) if written else "nothing to draw from yet")
    return 0


def setting_of(table: dict[str, Any], plan: list[Cell]) -> dict[str, Any]:
    """What the person's overrides change in the runs of a plan, as the section of the table that shows them."""
    row = next(row for row in table["rows"] if row["id"] == plan[0].row)
    base = row_config(row, plan[0].config["scale"], plan[0].config["protocol"])
    return {key: change[1] for key, change in differences(base, plan[0].config).items()}


def read_settings(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of configs/reproduce.yaml, checked, and the arguments left for the runs."""
    defaults = OmegaConf.load(
        CONFIGS / "reproduce.yaml"
    )  # plain values: Hydra would take `table` and `scale` for groups
    own = [a for a in arguments if a.split("=")[0] in set(defaults)]
    settings = OmegaConf.to_container(OmegaConf.merge(defaults, OmegaConf.from_dotlist(own)))
    assert isinstance(settings, dict)
    if (settings["table"] is None) == (settings["figure"] is None):
        raise ConfigError(
            f"name one table=... of {', '.join(tables())} or one figure=... of {', '.join(tables('figure'))}"
        )
    if (
        isinstance(settings["tflops"], bool)
        or not isinstance(settings["tflops"], int | float)
        or settings["tflops"] <= 0
    ):
        raise ConfigError(f"tflops must be a number above 0, got {settings['tflops']!r}")
    for group in ("scale", "protocol"):
        if settings[group] not in choices(group):
            raise ConfigError(unknown(group, str(settings[group]), choices(group)))
    for name, kind, example in (("seeds", int, "0,1"), ("rows", str, "kl_basic,gkl_basic")):
        given = settings[name]
        if given is not None and not (
            isinstance(given, list) and given and all(type(x) is kind for x in given)
        ):
            raise ConfigError(f"{name} must be a list such as {name}=[{example}], got {given!r}")
    if type(settings["plan"]) is not bool:
        raise ConfigError(f"plan must be true or false, got {settings['plan']!r}")
    if settings["jobs"] != "auto" and not (type(settings["jobs"]) is int and settings["jobs"] > 0):
        raise ConfigError(f"jobs must be auto or a number above 0, got {settings['jobs']!r}")
    return {str(key): value for key, value in settings.items()}, [a for a in arguments if a not in own]


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
