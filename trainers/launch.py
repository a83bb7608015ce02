"""Runs the missing cells of a plan: a process each, a pool over the devices, fail fast, nothing lost when killed."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainers.command import Interrupted
from trainers.folder import RunError
from trainers.plan import Cell
from trainers.report import duration
from trainers.run import freeze, run_folder


@dataclass
class Job:
    """A cell being run."""

    cell: Cell
    slot: int
    process: subprocess.Popen[bytes]
    log: Path
    started: float


def default_jobs(devices: int) -> int:
    """Runs at the same time: as many as the GPUs carry, or one per CPU core and process."""
    return max(1, (torch.cuda.device_count() or os.cpu_count() or 1) // devices)


def run_all(cells: Sequence[Cell], jobs: int) -> None:
    """Run every cell; raises RunError naming the row of the first one that fails, after stopping the others.

    Each run writes what it says to run.log in its folder. Stopped runs have saved themselves: the same command goes on.
    """
    waiting, running = list(cells), list[Job]()
    total, done = len(waiting), 0
    stop: list[int] = []
    before = {
        s: signal.signal(s, lambda signum, _: stop.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while waiting or running:
            while len(running) < jobs and not stop:
                ready = next((c for c in waiting if c.teacher is None or c.teacher.trained), None)
                if ready is None:
                    break
                waiting.remove(ready)
                slot = min(set(range(jobs)) - {job.slot for job in running})
                running.append(_start(ready, slot, jobs))
                print(
                    f"[{done}/{total}] started {_name(running[-1].cell)}; log {running[-1].log}", flush=True
                )
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                if job.process.returncode == 0:
                    done += 1
                    took = duration(time.monotonic() - job.started)
                    print(
                        f"[{done}/{total}] done {_name(job.cell)} in {took}: {_last_line(job.log)}",
                        flush=True,
                    )
                elif not stop:
                    raise RunError(
                        f"row {job.cell.row}, seed {job.cell.config['seed']} failed: {_last_line(job.log)} "
                        f"(whole log: {job.log})"
                    )
            if stop and not waiting and not running:
                break
            if stop:
                waiting.clear()
                for job in running:
                    job.process.terminate()
                for job in running:
                    job.process.wait()
                raise Interrupted(
                    f"stopped by {signal.Signals(stop[0]).name} with {done} of {total} runs done; the others saved where "
                    "they were. The same command goes on from there",
                    stop[0],
                )
    finally:
        for job in running:
            if job.process.poll() is None:
                job.process.terminate()
                job.process.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _start(cell: Cell, slot: int, jobs: int) -> Job:
    path = freeze(cell.config)
    log = run_folder(cell.config).path / "run.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    devices = cell.config["devices"]
    if torch.cuda.is_available():
        visible = os.environ.get(
            "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
        ).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[slot * devices : (slot + 1) * devices])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs * devices))))
    with open(log, "ab") as output:
        # Its own session: a Ctrl-C at the terminal reaches this process alone, which then ends the runs in order.
        process = subprocess.Popen(
            [sys.executable, "-m", "trainers.run", str(path)],
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    return Job(cell, slot, process, log, time.monotonic())


def _end_with_parent() -> None:
    """In the child: be sent SIGTERM when the parent dies, so that a killed table leaves no run behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _name(cell: Cell) -> str:
    return f"{cell.row} seed {cell.config['seed']} ({cell.config['experiment']})"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
