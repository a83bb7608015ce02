"""Runs on this machine: a process (or group of processes) each, on the GPUs of its slot."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainers.runs.paths import freeze, run_folder
from trainers.runs.plan import Cell
from trainers.runs.settings import check_machine
from trainers.signals import end_with_parent


@dataclass
class LocalJob:
    """A run in a process of this machine."""

    cell: Cell
    log: Path
    slot: int
    process: subprocess.Popen[bytes]
    state = "running"

    def poll(self) -> int | None:
        """The exit code once it has ended."""
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self) -> None:
        """Until it has ended."""
        self.process.wait()


class Local:
    """Starts runs on this machine. They end, saved, when the process that started them does."""

    here = True  # a single run takes the place of the process that starts it
    outlive = False
    poll_seconds = 0.2

    def __init__(self) -> None:
        self.jobs: list[LocalJob] = []

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError for what this machine cannot carry."""
        check_machine(config)

    def concurrent_runs(self, devices: int) -> int:
        """How many runs go at the same time unless told: as many as the GPUs carry, or one per CPU core and process."""
        return max(1, (torch.cuda.device_count() or os.cpu_count() or 1) // devices)

    def command(self, path: Path) -> list[str]:
        """What starts the run of a frozen configuration."""
        return [sys.executable, "-m", "trainers.runs", str(path)]

    def start(self, cells: Sequence[Cell], concurrent_runs: int) -> list[LocalJob]:
        """Start the runs, each in the lowest free of `concurrent_runs` slots."""
        started = []
        for cell in cells:
            self.jobs = [job for job in self.jobs if job.poll() is None]
            slot = min(set(range(concurrent_runs)) - {job.slot for job in self.jobs})
            self.jobs.append(self._start(cell, slot, concurrent_runs))
            started.append(self.jobs[-1])
        return started

    def _start(self, cell: Cell, slot: int, concurrent_runs: int) -> LocalJob:
        path = freeze(cell.config)
        log = run_folder(cell.config).path / "run.log"
        environment = self.environment(slot, cell.config["devices"], concurrent_runs)
        return LocalJob(cell, log, slot, spawn(self.command(path), log, environment))

    def environment(self, slot: int, devices: int, concurrent_runs: int) -> dict[str, str]:
        """What a run in a slot sees: its own GPUs and cores, shared where more runs go at the same time than there are GPUs for."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if torch.cuda.is_available():
            every = ",".join(map(str, range(torch.cuda.device_count())))
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
            first = slot % max(1, len(visible) // devices) * devices  # more runs than GPUs share them
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + devices])
        threads = max(1, (os.cpu_count() or 1) // (concurrent_runs * devices))
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        return environment


def spawn(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a run that writes to `log`, ends (saved) when this process dies, and hears no Ctrl-C of its terminal."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
