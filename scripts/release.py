"""Pack a finished run for others: safetensors, timm's config, model card, record, RobustBench's entry and issue text.

    python scripts/release.py run=results/runs/at/c100_basic_gkl/paper/<hash>/seed0.json            # on disk alone
    python scripts/release.py run=... out=release/ upload=name/repository                               # and to the Hugging Face Hub

Weights come from the outputs folder (GKL_OUTPUTS) and must be the very ones of the record.
"""

import trainers.interrupt  # noqa: F401

import sys
from pathlib import Path
from typing import Any

from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.reports.release import pack, upload
from trainers.runs.compose import compose
from trainers.runs.targets import unknown

SETTINGS = ("run", "out", "upload")


def main(arguments: list[str]) -> int:
    """Pack, and upload if asked. Returns the exit code."""
    given: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in SETTINGS:
            raise ConfigError(unknown("setting of a release", name, list(SETTINGS)))
        given[name] = value
    if not Path(given.get("run", "")).is_file():
        raise ConfigError(
            f"run=... must be a record, a seed<k>.json below results/runs, got {given.get('run') or 'nothing'}"
        )
    record = Path(given["run"])
    outputs = Path(compose("train", ["experiment=at/c100_basic_gkl"])["paths"]["outputs"])
    target = (
        Path(given["out"])
        if "out" in given
        else outputs / "release" / "-".join(record.with_suffix("").parts[-3:])
    )
    for path in pack(record, outputs, target):
        print(f"wrote {path}")
    if "upload" in given:
        print(f"uploaded to {upload(target, given['upload'])}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
