"""The processes of a run: each one's device, the group they form, and how they are started."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gkl.distributed import world_size
from trainers.errors import ConfigError, RunError


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


@contextmanager
def process_group(config: dict[str, Any]) -> Iterator[None]:
    """Inside, the processes that torchrun started talk to each other: nccl on GPUs, gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    device = device_of(config)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def launch(path: Path, devices: int, shared: argparse.Namespace) -> int:
    """Start `devices` processes on a frozen configuration, as torchrun does; returns the exit code of the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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
    try:
        elastic_launch(launch_config, sys.executable)("-m", "trainers.runs", str(path))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode or 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RendezvousError, dist.DistError) as error:
        if shared.restarts < 1:
            raise RunError(
                f"the {shared.nodes} machines did not meet at {shared.endpoint} ({str(error).splitlines()[0]}); is the same command "
                "running on each, and can each reach that address? What was finished is kept"
            ) from error
        # A machine died while the others gathered, or the one with the endpoint did: all begin to gather anew.
        print(
            f"the machines lost each other ({str(error).splitlines()[0][:120]}); meeting again",
            file=sys.stderr,
            flush=True,
        )
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
    return 0
