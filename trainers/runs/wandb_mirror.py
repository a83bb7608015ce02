"""A wandb run that repeats what a run's own files say, kept by a process of its own, so that its trouble is never the training's.

    mirror = Mirror(folder, settings)      # in the training process: starts the other and goes on
    mirror.close(patience)                 # waits for it so many seconds; None, or what the person should know

The other process (python -m trainers.runs.wandb_mirror mirror.json) follows history.jsonl, the source, until the training process ends in
whatever way, then repeats the record's metrics. What it has sent is kept in mirrored.json: a run that goes on after a stop sends
the epochs that follow, to the same wandb run. A service that cannot be reached makes it write an offline run instead.
"""

import fcntl
import json
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainers.files import write_text
from trainers.loop.folder import RunFolder
from trainers.runs.records import is_whole

POLL_SECONDS = 1.0
INIT_SECONDS = 60.0  # for the service to answer, before the run is written offline
LINGER_SECONDS = 3600  # after the training's end, for what is still being sent


class Mirror:
    """The training process's end of it."""

    def __init__(self, folder: RunFolder, settings: dict[str, Any]) -> None:
        """settings: what the other process gets, see follow."""
        self.folder = folder
        path = folder.path / "mirror.json"
        write_text(path, json.dumps(settings))
        with open(folder.path / "mirror.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainers.runs.wandb_mirror", str(path)],
                stdin=subprocess.PIPE,  # open for as long as this process lives, and no longer
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is not meant for it
            )

    def close(self, patience: float) -> str | None:
        """Say that the run is over; returns what is not as it should be, or None."""
        assert self.process.stdin
        # The pipe's end alone may be long in coming: worker processes have the pipe, too.
        with suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(b"over")
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return f"wandb is still sending after {patience:g} s and goes on by itself; make dashboard-sync sends what is left"
        trouble = _state(self.folder).get("trouble") or (f"its process ended with {code}" if code else None)
        if trouble is None:
            return None
        return f"wandb is out ({trouble}); history.jsonl has everything, and make dashboard-sync sends what was written offline"


def follow(settings: dict[str, Any]) -> None:
    """Repeat the history of a run until standard input ends, then the metrics of its record where there is one.

    settings: mode (online or offline), project, entity, name, group, job_type, tags, id (derived from the run's identity, so that
    a resumed run continues the same wandb run), config, folder and record (paths).
    """
    folder, record = RunFolder(Path(settings["folder"])), Path(settings["record"])
    lock = open(folder.path / "mirror.lock", "a", encoding="utf-8")
    fcntl.flock(
        lock, fcntl.LOCK_EX
    )  # the process of a run that was stopped a moment ago may still be at work
    sent, over = int(_state(folder).get("epoch", 0)), False
    run, trouble = _start(settings)
    while not over:
        over = bool(
            select.select([sys.stdin], [], [], POLL_SECONDS)[0]
        )  # readable once the run says that it is over, or is no more
        for row in folder.history():
            if row["epoch"] > sent:
                run.log(row)
                sent = row["epoch"]
                write_text(_state_path(folder), json.dumps({"epoch": sent, "trouble": trouble}))
    signal.alarm(LINGER_SECONDS)
    if is_whole(record):
        run.summary.update(json.loads(record.read_text(encoding="utf-8"))["metrics"])
        run.finish()
    else:
        run.mark_preempting()
        run.finish(exit_code=1)
    write_text(_state_path(folder), json.dumps({"epoch": sent, "trouble": trouble}))


def _start(settings: dict[str, Any]) -> tuple[Any, str | None]:
    """The wandb run, and why it is an offline one where an online one was asked for."""
    import wandb

    names = ("project", "entity", "name", "group", "job_type", "tags", "id", "config")
    options = {**{name: settings[name] for name in names}, "dir": settings["folder"], "resume": "allow"}
    trouble, mode = None, settings["mode"]
    while True:
        try:
            run = wandb.init(
                mode=mode,
                settings=wandb.Settings(silent=True, init_timeout=INIT_SECONDS, console="off"),
                **options,
            )
            break
        except Exception as error:
            if mode == "offline":
                raise
            trouble, mode = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "offline"
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    return run, trouble


def _state_path(folder: RunFolder) -> Path:
    return folder.path / "mirrored.json"


def _state(folder: RunFolder) -> dict[str, Any]:
    path = _state_path(folder)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    follow(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
