"""Train one run, evaluate it, write its record.

    python scripts/train.py experiment=at/c100_basic_gkl scale=smoke seed=0 [loss.gamma=0.3 devices=4 ...]
    python scripts/train.py experiment=... assessment=epsilons        # and measure more on its weights: epsilons, attacks, structure
    python scripts/train.py experiment=... --cfg      # only print the resolved configuration

Stopped at any moment (Ctrl-C, SIGTERM, SIGKILL) and started again with the same command, it goes on where it was.
"""

import trainers.interrupt  # noqa: F401

import sys

from omegaconf import OmegaConf

from trainers.command import become, run_main
from trainers.errors import ConfigError
from trainers.runs.compose import compose
from trainers.runs.launch import run_all
from trainers.runs.paths import check_sources, freeze, processes
from trainers.runs.plan import Cell
from trainers.runs.reproduce import ended
from trainers.runs.settings import check
from trainers.runs.targets import instantiate


def main(arguments: list[str]) -> int:
    """Compose, check, freeze, start the processes. Returns the exit code."""
    config = compose("train", [a for a in arguments if a != "--cfg"])
    if "--cfg" in arguments:
        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return 0
    check(config, processes(config))
    launcher = instantiate(config["launcher"])
    launcher.check(config)
    cell = Cell(config["experiment"], config)
    if cell.status == "done":
        if cell.stale:
            raise ConfigError(cell.stale)
        print(f"this run is done: {cell.record}")
        return 0
    check_sources(config)
    if launcher.here:
        become(launcher.command(freeze(config)))  # the run takes this process's place
    return ended(run_all([cell], launcher, 1, keep_going=False))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
