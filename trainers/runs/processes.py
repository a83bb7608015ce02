"""The processes of a run: each one's device, the group they form, and how they are started."""

import argparse
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from gkl.distributed import agree, rank, world_size
from trainers.errors import ConfigError, LostProcess, RunError, in_a_line
from trainers.files import write_text
from trainers.signals import ending, heeded, unheard

WAIT = timedelta(minutes=30)  # of a process for the others: for what they download and decode, at most
SHARED_SECONDS = 20.0  # for a file that another machine has written to be seen here


def device_of(config: dict[str, Any]) -> torch.device:
    """This process's device."""
    wanted = config["device"]
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda needs a GPU that torch can see, there is none; use device=cpu or device=auto"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def one_process_a_node_first() -> Iterator[None]:
    """Inside, one process of each node is alone before the others enter: what it downloads, they find."""
    alone = os.environ.get("LOCAL_RANK", "0") == "0"
    if world_size() > 1 and not alone:
        dist.barrier()
    yield
    if world_size() > 1 and alone:
        dist.barrier()


def check_ranks() -> None:
    """Raises ConfigError where torchrun's variables are left over in the environment of a process that it has not started."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    rank, size, local = (
        int(word) if word is not None and word.isdecimal() else None for word in given.values()
    )
    numbers = all(word is None or word.isdecimal() for word in given.values())
    if (
        not numbers
        or (size or 1) <= (rank or 0)
        or (local or 0) >= (size or 1)
        or ((size or 1) > 1 and rank is None)
    ):
        told = ", ".join(f"{name}={word}" for name, word in given.items() if word is not None)
        raise ConfigError(
            f"the environment has {told}, which says of no process of a run which one it is; start it with torchrun, or unset them"
        )


@contextmanager
def process_group(config: dict[str, Any]) -> Iterator[None]:
    """Inside, the processes that torchrun started talk to each other: nccl on GPUs, gloo on CPUs."""
    check_ranks()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    device = device_of(config)
    try:
        with unheard():  # nothing is there to be saved yet
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
        yield
    except RuntimeError as error:
        ours = isinstance(error, dist.DistError) or "/gloo/" in str(error)  # gloo has no error of its own
        if not ours:
            raise
        raise LostProcess(
            f"process {os.environ['RANK']} of this run has lost another, or waited for it for {WAIT.seconds // 60} minutes "
            f"({in_a_line(error)}); the last checkpoint is intact, and the same command goes on from there"
        ) from error
    finally:
        if dist.is_initialized():
            gc.collect()  # a network left in a cycle would keep the group, and gloo's threads past the end of Python
            dist.destroy_process_group()


def check_shared(folders: Sequence[Path]) -> None:
    """Raises RunError on every process unless all see the same folders: each reads there what process 0 has written."""
    if world_size() == 1:
        return
    name = f".meeting-{agree(secrets.randbits(48)):x}.{agree(os.getpid() if rank() == 0 else 0)}.tmp"
    if rank() == 0:
        for folder in folders:
            write_text(folder / name, "")
    dist.barrier()
    deadline, unseen = time.monotonic() + SHARED_SECONDS, list(folders)
    while (unseen := [f for f in unseen if not (f / name).exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    alone = agree(len(unseen))
    if rank() == 0:
        for folder in folders:
            (folder / name).unlink(missing_ok=True)
    if alone:
        which = ", ".join(map(str, unseen or folders))
        raise RunError(
            f"the processes of this run do not see the same files under {which}; outputs and results must lie on a file system that "
            "all machines share: set GKL_OUTPUTS and GKL_RESULTS to one"
        )


def launch(path: Path, devices: int, shared: argparse.Namespace) -> int:
    """Start `devices` processes on a frozen configuration, as torchrun does; returns the exit code of the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if shared.nodes > 1:
        _check_endpoint(shared.endpoint, shared.wait)
    if shared.restarts < 1:
        logging.disable(logging.ERROR)  # what torch has to say of the processes is said below
    settings: dict[str, Any] = {"join_timeout": shared.wait, "read_timeout": int(shared.wait)}
    if shared.address:  # torch would ask the host name whether the endpoint is this machine
        settings["is_host"] = shared.endpoint.rpartition(":")[0] == shared.address
    launch_config = LaunchConfig(
        min_nodes=shared.nodes,
        max_nodes=shared.nodes,
        nproc_per_node=devices,
        rdzv_backend="c10d",
        rdzv_endpoint=shared.endpoint,
        rdzv_configs=settings,
        run_id="-".join(path.parts[-5:-1]),
        max_restarts=shared.restarts,
        local_addr=shared.address,
    )
    launch_config.signals_to_handle = ",".join(
        s.name for s in heeded()
    )  # under nohup not SIGHUP; a field since torch 2.9
    try:
        elastic_launch(launch_config, sys.executable)("-m", "trainers.runs", str(path))
    except ChildFailedError as error:
        return _told(*error.get_first_failure())
    except SignalException as error:
        ending()
        return 128 + int(error.sigval)
    except (RendezvousError, dist.DistError) as error:
        if shared.restarts < 1:
            raise RunError(
                f"the {shared.nodes} machines did not meet at {shared.endpoint} ({in_a_line(error)}); is the same command "
                "running on each, and can each reach that address? What was finished is kept"
            ) from error
        _meet_again(path, shared, error)
    return 0


def _told(number: int, failure: Any) -> int:
    """The exit code of a process that failed; one that a signal has ended could not say so itself."""
    if failure.exitcode >= 0:
        return failure.exitcode or 1
    name = signal.Signals(-failure.exitcode).name
    why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    print(
        f"error: process {number} of this run was ended by {name}{why}; the last checkpoint is intact, and the same command goes on "
        "from there",
        file=sys.stderr,
    )
    return 128 - int(failure.exitcode)


def _meet_again(path: Path, shared: argparse.Namespace, error: Exception) -> NoReturn:
    """A machine died while the others gathered, or the one with the endpoint did: all begin to gather anew."""
    print(f"the machines lost each other ({in_a_line(error)}); meeting again", file=sys.stderr, flush=True)
    again = [
        "--nodes",
        str(shared.nodes),
        "--endpoint",
        shared.endpoint,
        "--restarts",
        str(shared.restarts - 1),
    ]
    again += ["--wait", str(shared.wait), *(["--address", shared.address] if shared.address else [])]
    os.execv(sys.executable, [sys.executable, "-m", "trainers.runs", str(path), *again])


def _check_endpoint(endpoint: str, wait: float) -> None:
    """Raises RunError, or ends the process with its line, where something else than a run's meeting place answers there."""
    host, _, port = endpoint.rpartition(":")
    taken = (
        f"another service than a run's meeting place answers at {endpoint}; choose a free port with launcher.endpoint=HOST:PORT, the "
        "same on each machine"
    )

    def give_up() -> None:  # torch asks in C, and waits for ever for a service that says nothing
        print(f"error: {taken}", file=sys.stderr, flush=True)
        os._exit(2)

    try:
        socket.create_connection((host, int(port)), timeout=min(wait, 10.0)).close()
    except OSError:  # nobody is there yet, or its name is not known yet: the launcher waits
        return
    timer = threading.Timer(wait, give_up)
    timer.daemon = True
    timer.start()
    try:
        with unheard():
            dist.TCPStore(  # type: ignore[attr-defined]
                host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=wait)
            )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(taken) from error
    finally:
        timer.cancel()
