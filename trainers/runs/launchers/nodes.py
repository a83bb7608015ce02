"""Runs over several machines by torchrun's elastic rendezvous: the same command is typed on each of them.

A machine that dies may come back: the others' processes wait for it and all go on from the last checkpoint. `outputs` and
`results` must lie on a file system that all of them see.
"""

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.errors import ConfigError
from trainers.runs.launchers.local import Local
from trainers.runs.settings import check_machine


class TorchrunNodes(Local):
    """Starts this machine's share of each run, one run after the other."""

    def __init__(
        self, nodes: int, endpoint: str | None, address: str | None, restarts: int, wait_minutes: float
    ) -> None:
        """endpoint: HOST:PORT of one of the machines. address: this machine's own, where its host name is not it.

        restarts: how often a run is taken up again after a process of it failed or a machine was lost. wait_minutes: for the
        machines to gather.
        """
        super().__init__()
        self.nodes, self.endpoint, self.address = nodes, endpoint, address
        self.restarts, self.wait_minutes = restarts, wait_minutes

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError for an endpoint that is none, or what this machine cannot carry of a run."""
        if not re.fullmatch(r"\S+:\d+", self.endpoint or ""):
            raise ConfigError(
                f"launcher.endpoint must be HOST:PORT of one of the {self.nodes} machines, the same on each of them, got "
                f"{self.endpoint!r}; for instance launcher.endpoint={socket.gethostname()}:29500"
            )
        check_machine(config)

    def concurrent_runs(self, devices: int) -> int:
        """One: every machine has a part of each run."""
        return 1

    def command(self, path: Path) -> list[str]:
        """What starts this machine's share of a run."""
        return [
            *super().command(path), "--nodes", str(self.nodes), "--endpoint", str(self.endpoint),
            "--restarts", str(self.restarts), "--wait", str(60 * self.wait_minutes),
            *(["--address", self.address] if self.address else []),
        ]  # fmt: skip
