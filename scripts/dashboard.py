"""wandb workspaces that set KL against GKL, one for each table that compares rows; built from the records, pushed on request.

    python scripts/dashboard.py                    # write results/dashboard/*.json and a preview of each; needs no login
    python scripts/dashboard.py table=3 scale=paper
    python scripts/dashboard.py sync=true [project=gkl entity=NAME]    # send offline runs and the workspaces to wandb

scale: of the runs shown; by default the one of which the table has most. Logged in with `wandb login` or WANDB_API_KEY.
"""

import trainers.interrupt  # noqa: F401

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.files import write_atomically, write_text
from trainers.reports.dashboard import compared, preview, runs_of, spec, workspace
from trainers.reports.figures import save
from trainers.reports.render import sections
from trainers.reports.tables import Table
from trainers.runs.compose import choices
from trainers.runs.paths import folders
from trainers.runs.plan import load_table, tables
from trainers.runs.records import read_records
from trainers.runs.reproduce import ended
from trainers.runs.targets import unknown

SETTINGS: dict[str, Any] = {"table": None, "scale": None, "sync": False, "project": "gkl", "entity": ""}


def main(arguments: list[str]) -> int:
    """Build, write, and push if asked. Returns the exit code."""
    for argument in arguments:
        if argument.partition("=")[0] not in SETTINGS:
            raise ConfigError(unknown("setting of a dashboard", argument.partition("=")[0], list(SETTINGS)))
    settings = {**SETTINGS, **OmegaConf.to_container(OmegaConf.from_dotlist(arguments))}  # type: ignore[dict-item]
    if settings["scale"] not in (None, *choices("scale")):
        raise ConfigError(unknown("scale", str(settings["scale"]), choices("scale")))
    results, outputs = (Path(folders()[name]) for name in ("results", "outputs"))
    if settings["sync"]:
        check_login()
        send_runs(outputs)
    records = read_records(results / "runs")
    asked = [str(settings["table"])] if settings["table"] is not None else list(tables())
    for number in asked:
        config = load_table(number)
        found = [made for made in sections(config, records) if settings["scale"] in (None, made.scale)]
        table = max(found, key=lambda made: runs_shown(config, made), default=None)
        if table is None or not compared(config, table):
            if settings["table"] is not None:
                raise ConfigError(
                    f"{config['name']} has no records of rows it compares to show; first: make {config['target']} SCALE=small"
                )
            continue
        made = workspace(
            config, table, results / "runs", project=settings["project"], entity=settings["entity"]
        )
        text = spec(made)
        path = results / "dashboard" / f"{config['name']}.json"
        write_text(path, json.dumps(text, indent=1) + "\n")
        drawn = preview(text, config, table, results / "runs")
        write_atomically(path.with_suffix(".png"), partial(save, drawn, kind="png"))
        print(f"wrote {path} and its preview")
        if settings["sync"]:
            print(f"pushed {made.save().url}")
    return ended(records.damaged)


def runs_shown(config: Mapping[str, Any], table: Table) -> int:
    """How many runs a table's workspace would show."""
    rows = compared(config, table)
    return sum(map(len, runs_of(config, rows)[1].values())) if rows else 0


def check_login() -> None:
    """Raises ConfigError when wandb has no key."""
    import wandb

    if not wandb.login(prompt=False):
        raise ConfigError(
            "sync=true needs a wandb login; run `wandb login` or set WANDB_API_KEY, then this command again"
        )


def send_runs(outputs: Path) -> None:
    """Hand every run that was written offline to `wandb sync`, the fragments of a resumed run in their order."""
    found = sorted(outputs.rglob("wandb/offline-run-*"), key=lambda path: path.name)
    if found:
        subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, found)], check=True)
    print(f"sent {len(found)} offline runs")


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
