"""Work on several processes of one group, as a run's."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imports take seconds: they are made once, by a process that the others come from. These see the environment of its start.
FORKED = mp.get_context("forkserver")
FORKED.set_forkserver_preload(["torch.distributed", "trainers.runs.settings"])


def on_processes(body: Callable[..., None], folder: Path, *arguments: object, count: int = 2) -> None:
    """body(*arguments) on `count` processes, which talk by gloo, each of one thread; returns when all have ended well."""
    rendezvous = folder / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    given = (body, f"file://{rendezvous}", count, arguments)
    mp.start_processes(_member, args=given, nprocs=count, start_method="forkserver")


def _member(
    rank: int, body: Callable[..., None], place: str, count: int, arguments: tuple[object, ...]
) -> None:
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=count)
    torch.set_num_threads(1)
    body(*arguments)
    dist.barrier()  # none leaves before the others
    gc.collect()  # no model that holds the group is left in a cycle
    dist.destroy_process_group()
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], "gloo's threads outlive the group"
