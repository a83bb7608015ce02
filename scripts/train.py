"""Train one run, evaluate it, write its record.

    python scripts/train.py experiment=at/c100_basic_gkl scale=smoke seed=0 [loss.gamma=0.3 devices=4 ...]
    python scripts/train.py experiment=... assessment=epsilons        # and measure more on its weights: epsilons, attacks, structure
    python scripts/train.py experiment=... --cfg      # only print the resolved configuration

Stopped at any moment (Ctrl-C, SIGTERM, SIGKILL) and started again with the same command, it goes on where it was.
"""

import os
import sys

from omegaconf import OmegaConf

from trainers.command import run_main
from trainers.configuration import check, check_machine, compose
from trainers.plan import Cell
from trainers.run import check_teacher, freeze, run_folder


def main(arguments: list[str]) -> int:
    """Compose, check, freeze, start the processes. Returns the exit code."""
    config = compose("train", [a for a in arguments if a != "--cfg"])
    if "--cfg" in arguments:
        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return 0
    check(config, config["devices"])
    check_machine(config)
    record = Cell(config["experiment"], config).record
    if record.exists():
        print(f"this run is done: {record}")
        return 0
    check_teacher(config)
    with run_folder(config).locked():
        path = freeze(config)
    os.execv(
        sys.executable, [sys.executable, "-m", "trainers.run", str(path)]
    )  # the run takes this process's place


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
