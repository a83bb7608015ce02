"""One run from its frozen configuration: train, evaluate, write the record.

    python -m trainers.runs outputs/<experiment>/<scale>/<hash>/seed0/<hash>.yaml
    python -m trainers.runs .../<hash>.yaml --nodes 2 --endpoint HOST:29500          # the same command on each of two machines
    torchrun --nproc_per_node 4 -m trainers.runs .../<hash>.yaml

Started alone with `devices` above 1 it starts that many processes itself, as torchrun would.
Exit code: 0 done, 2 something the person can mend (one line says what), 128 + signal when stopped by it.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.signals import end_with_parent


def main(arguments: list[str]) -> int:
    """Command line of one run. Returns the exit code."""
    # These take seconds to read, in which a signal is heard already and ends in its line.
    from omegaconf import OmegaConf

    from trainers.runs.paths import run_folder
    from trainers.runs.processes import check_ranks, launch, process_group
    from trainers.runs.run import run

    parser = argparse.ArgumentParser(prog="python -m trainers.runs", exit_on_error=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--endpoint", default="localhost:0")
    parser.add_argument("--address")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--wait", type=float, default=600.0)
    try:
        given = parser.parse_args(arguments)
        if not given.config.is_file():
            raise argparse.ArgumentError(None, f"{given.config} is no file")
    except argparse.ArgumentError as error:
        raise ConfigError(f"usage: python -m trainers.runs CONFIG.yaml; {error}") from None
    check_ranks()
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(given.config)))
    if "WORLD_SIZE" not in os.environ and config["devices"] * given.nodes > 1:
        return launch(given.config, config["devices"], given)
    if "RANK" in os.environ:
        end_with_parent()
    first = os.environ.get("RANK", "0") == "0"
    with run_folder(config).locked() if first else nullcontext(), process_group(config):
        run(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
