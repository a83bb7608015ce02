"""Runs as Slurm jobs, submitted by submitit: arrays, time limits, preemption.

A job that nears its time limit or is preempted (SIGUSR2 of submitit, SIGTERM of Slurm) lets its run save a checkpoint and puts
itself back into the queue; the run goes on there, in the same bits. The jobs do not need the process that submitted them: started
again, the same command finds them in the queue. `outputs` and `results` must lie on a file system that the nodes see.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from trainers.errors import ConfigError, RunError
from trainers.files import write_text
from trainers.runs.launchers.local import spawn
from trainers.runs.paths import freeze, run_folder
from trainers.runs.plan import Cell

ARRAY_JOBS = 500  # of one array at most: Slurm's own limit is 1001 unless the cluster says otherwise
LOST_SECONDS = 20.0  # after a job has left the queue, for its record to become visible here
QUEUE_SECONDS = 5.0  # between two looks at the queue
RESTARTS = 3  # of a run over several nodes, when one of its processes fails


class Queue:
    """This user's jobs in Slurm's queue, looked at every few seconds."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.seen = float("-inf")

    def state(self, job: str) -> str | None:
        """PENDING, RUNNING and so on; None for a job that is not in the queue."""
        if time.monotonic() - self.seen > QUEUE_SECONDS:
            told = subprocess.run(
                ["squeue", "--me", "-h", "-r", "-o", "%i|%T"], capture_output=True, text=True, check=False
            )
            if (
                told.returncode == 0
            ):  # a controller that does not answer for a while says nothing about the jobs
                self.states = dict(line.strip().split("|") for line in told.stdout.splitlines())
                self.seen = time.monotonic()
        return self.states.get(job) if self.seen > float("-inf") else "UNKNOWN"


@dataclass
class SlurmJob:
    """A run in Slurm's hands."""

    cell: Cell
    log: Path
    id: str
    queue: Queue = field(repr=False)
    left: float | None = None  # when it was first missed in the queue

    @property
    def state(self) -> str:
        """running, or the queue's word with the job's number."""
        state = self.queue.state(self.id)
        return f"job {self.id} {(state or 'left the queue').lower()}"

    def poll(self) -> int | None:
        """0 once the run has its record, 1 once the job has left the queue without one."""
        if self.cell.status == "done":
            return 0
        if self.queue.state(self.id) is not None:
            self.left = None
            return None
        self.left = self.left or time.monotonic()
        return 1 if time.monotonic() - self.left > LOST_SECONDS else None

    def stop(self) -> None:
        """Take it out of the queue; a run that has begun saves first."""
        subprocess.run(["scancel", self.id], capture_output=True, check=False)

    def wait(self) -> None:
        """Slurm ends it by itself."""


class Slurm:
    """Submits runs to Slurm."""

    here = False
    outlive = True
    poll_seconds = 1.0

    def __init__(
        self,
        partition: str | None,
        account: str | None,
        qos: str | None,
        minutes: int,
        warning_seconds: int,
        requeues: int,
        array: int,
        nodes: int,
        gpus: int,
        cpus_per_device: int,
        memory_gb: float | None,
        setup: list[str],
        python: str | None,
        extra: dict[str, Any],
    ) -> None:
        """See configs/launcher/slurm.yaml."""
        self.requeues, self.nodes, self.cpus_per_device, self.python = (
            requeues,
            nodes,
            cpus_per_device,
            python,
        )
        self.parameters = {
            "partition": partition, "account": account, "qos": qos, "time": minutes, "signal_delay_s": warning_seconds,
            "array_parallelism": array, "nodes": nodes, "gpus_per_node": gpus or None, "setup": setup or None,
            "mem": f"{memory_gb:g}GB" if memory_gb else None, "additional_parameters": {"requeue": True, **extra},
        }  # fmt: skip
        self.queue = Queue()

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError without Slurm's commands or submitit. The nodes' GPUs are not this machine's to judge."""
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launcher=slurm needs sbatch on the PATH; start this on a login node of the cluster, or use launcher=local"
            )
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ConfigError("launcher=slurm needs submitit: pip install 'gkl[slurm]'") from None

    def concurrent_runs(self, devices: int) -> int:
        """As many as an array holds: Slurm runs launcher.array of them at the same time."""
        return ARRAY_JOBS

    def start(self, cells: Sequence[Cell], concurrent_runs: int) -> list[SlurmJob]:
        """Find the runs that are in the queue already, submit the others as one array."""
        jobs, new = [], []
        for cell in cells:
            job = self._submitted(cell)
            if job and self._goes_on(job):
                jobs.append(SlurmJob(cell, _log(cell), job, self.queue))
            else:
                new.append(cell)
        for cell, job in zip(new, self._submit(new) if new else [], strict=True):
            write_text(_ticket(cell), json.dumps({"job": job}))
            jobs.append(SlurmJob(cell, _log(cell), job, self.queue))
        self.queue.seen = min(
            self.queue.seen, time.monotonic() - QUEUE_SECONDS
        )  # look before the next answer
        return jobs

    def _goes_on(self, job: str) -> bool:
        """Whether a job is in the queue; one that is being ended may yet come back to it."""
        while (state := self.queue.state(job)) == "COMPLETING":
            time.sleep(QUEUE_SECONDS)
        return state is not None

    def _submitted(self, cell: Cell) -> str | None:
        ticket = _ticket(cell)
        return json.loads(ticket.read_text(encoding="utf-8"))["job"] if ticket.exists() else None

    def _submit(self, cells: Sequence[Cell]) -> list[str]:
        import submitit

        config = cells[0].config
        executor = submitit.SlurmExecutor(
            folder=Path(config["paths"]["outputs"]).resolve() / "slurm",
            max_num_timeout=self.requeues,
            python=self.python,
        )
        cpus = self.cpus_per_device * config["devices"]
        parameters = {**self.parameters, "job_name": "gkl", "ntasks_per_node": 1, "cpus_per_task": cpus}
        executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
        try:
            with executor.batch():
                jobs = [
                    executor.submit(SlurmRun(freeze(c.config).resolve(), self.nodes, self.cpus_per_device))
                    for c in cells
                ]
        except submitit.core.utils.FailedJobError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise RunError(
                f"Slurm refused the jobs: {lines[-1] if lines else 'it did not say why'}"
            ) from error
        return [job.job_id for job in jobs]


class SlurmRun:
    """What a job does on each of its nodes: run a frozen configuration, and save and requeue it when told to stop."""

    def __init__(self, path: Path, nodes: int, cpus_per_device: int) -> None:
        self.path, self.nodes, self.cpus_per_device = path, nodes, cpus_per_device
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Ends with the run's exit code."""
        from submitit import JobEnvironment

        environment = JobEnvironment()
        self.requeue = signal.getsignal(getattr(signal, f"SIG{environment.USR_SIG}"))
        signal.signal(signal.SIGTERM, self._terminated)
        command = [sys.executable, "-m", "trainers.runs", str(self.path)]
        if self.nodes > 1:
            port = 20_000 + int(environment.raw_job_id) % 20_000
            command += ["--nodes", str(self.nodes), "--endpoint", f"{environment.hostnames[0]}:{port}"]
            command += ["--restarts", str(RESTARTS)]
        threads = {"OMP_NUM_THREADS": str(self.cpus_per_device), "PYTHONUNBUFFERED": "1"}
        self.process = spawn(command, self.path.with_name("run.log"), {**os.environ, **threads})
        _until_ended(self.process)
        if code := self.process.wait():
            sys.exit(code)

    def checkpoint(self) -> Any:
        """submitit calls this before it puts the job back into the queue."""
        from submitit.helpers import DelayedSubmission

        self._save()
        return DelayedSubmission(SlurmRun(self.path, self.nodes, self.cpus_per_device))

    def _save(self) -> None:
        if self.process:
            self.process.terminate()
            _until_ended(self.process)

    def _terminated(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM is a preemption that wants the job back, or a cancellation that does not: the queue knows."""
        self._save()
        job = os.environ["SLURM_JOB_ID"]
        told = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False
        )
        if told.stdout.strip() == "RUNNING" and callable(self.requeue):
            self.requeue(signum, frame)
        sys.exit(128 + signum)


def _until_ended(process: subprocess.Popen[bytes]) -> None:
    """Wait without reaping: Popen.wait holds a lock, for which a signal handler that interrupts it would wait for ever."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def _log(cell: Cell) -> Path:
    return run_folder(cell.config).path / "run.log"


def _ticket(cell: Cell) -> Path:
    return run_folder(cell.config).path / "slurm.json"
