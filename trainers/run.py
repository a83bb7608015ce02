"""One run from its frozen configuration: train, evaluate, write the record.

    python -m trainers.run outputs/<experiment>/<scale>/<identity>/seed0/config.yaml
    python -m trainers.run .../config.yaml --nodes 2 --endpoint HOST:29500          # the same command on each of two machines
    torchrun --nproc_per_node 4 -m trainers.run .../config.yaml

Started alone with `devices` above 1 it starts that many processes itself, as torchrun would.
Exit code: 0 done, 2 something the person can mend (one line says what), 128 + signal when stopped by it.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from gkl import records
from gkl.distributed import rank, world_size
from trainers import assess, configuration
from trainers.command import run_main
from trainers.configuration import ConfigError
from trainers.engine import fit
from trainers.folder import RunError, RunFolder, save_state, write_atomically, write_text
from trainers.mirror import Mirror
from trainers.report import Console
from trainers.teacher import teacher_config

STOPPED_SECONDS = (
    2.0  # that a run which was stopped gives wandb: the rest of its grace is the next checkpoint's
)


def run_folder(config: dict[str, Any]) -> RunFolder:
    """Where a run keeps its checkpoints and history: <outputs>/<experiment>/<scale>/<identity>/seed<k>."""
    identity = records.identity(config)
    path = Path(config["paths"]["outputs"]) / config["experiment"] / config["scale"] / identity
    return RunFolder(path / f"seed{config['seed']}")


def processes(config: dict[str, Any]) -> int:
    """How many processes share each batch of a run."""
    return int(config["devices"] * config["launcher"].get("nodes", 1))


def record_path(config: dict[str, Any]) -> Path:
    """Where a run's record is written."""
    return records.record_path(
        Path(config["paths"]["results"]) / "runs",
        config["experiment"],
        config["scale"],
        records.identity(config),
        config["seed"],
    )


def with_teacher(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the path of its teacher's record, where the teacher is a run of ours."""
    teacher = teacher_config(config)
    if teacher is None:
        return config
    return {**config, "teacher": {**config["teacher"], "record": str(record_path(teacher))}}


def check_teacher(config: dict[str, Any]) -> None:
    """Raises ConfigError naming the teacher whose record or weights a student run lacks."""
    if config.get("teacher"):
        configuration.make(with_teacher(config)["teacher"]).check()


def freeze(config: dict[str, Any]) -> Path:
    """Write the resolved configuration into its run's folder; every process of the run starts from this file."""
    config = with_teacher(config)
    folder = run_folder(config)
    folder.open("lock").close()  # says what is wrong with it, if anything is
    path = folder.path / "config.yaml"
    write_atomically(path, lambda temporary: OmegaConf.save(OmegaConf.create(config), temporary))
    path.with_name("progress.json").unlink(missing_ok=True)  # of an earlier start
    return path


def run(config: dict[str, Any]) -> None:
    """Train, evaluate, record, and make the assessment asked for; what has its record already is not done again.

    On every process of the run. Raises RunError, Interrupted.
    """
    configuration.check(config, world_size())
    device, code = device_of(config), _code()  # as it is now: the files may change while the run goes on
    folder = run_folder(config)
    title = f"{config['experiment']} seed {config['seed']}"
    console = Console(title, enabled=rank() == 0, folder=folder.path)
    torch.manual_seed(config["seed"])
    if config["compile"]:  # once: the next start finds it there
        os.environ.setdefault(
            "TORCHINDUCTOR_CACHE_DIR", str(Path(config["paths"]["outputs"]).resolve() / "compiled")
        )
    done = record_path(config).exists()
    if world_size() > 1:
        dist.barrier()  # none may write the record before all have looked for it
    with one_process_a_node_first():
        data = configuration.make(config["data"])
        model = configuration.make(config["model"], num_classes=data.num_classes)
        try:
            task = configuration.build(config, data=data, model=model, device=device)
            if config.get("assessment"):
                configuration.make(config["assessment"]).check()
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error
    task.say = console.say
    if not done:
        with mirrored(config, folder, console):
            _train(config, task, folder, console, code)
    if config.get("assessment"):
        _assess(config, task, folder, console, code)


@contextmanager
def mirrored(config: dict[str, Any], folder: RunFolder, console: Console) -> Iterator[None]:
    """Inside, wandb repeats what the run's files say, unless logger=off."""
    logger = config["logger"]
    if rank() != 0 or logger["mode"] == "off":
        yield
        return
    table, row = logger["table"] or config["experiment"], logger["row"]
    mirror = Mirror(
        folder,
        {
            **{key: logger[key] for key in ("mode", "project", "entity")},
            "id": f"{records.identity(config)}-seed{config['seed']}",
            "name": f"{row or config['experiment']} seed {config['seed']}",
            "group": f"{table}/{row}" if row else table,
            "job_type": config["scale"],
            "tags": [config["scale"], config["protocol"]],
            "config": {**config, "table": logger["table"], "row": row},
            "folder": str(folder.path),
            "record": str(record_path(config)),
        },
    )
    try:
        yield
    except BaseException:
        mirror.close(STOPPED_SECONDS)
        raise
    if trouble := mirror.close(logger["patience"]):
        console.warn(trouble)


def _train(
    config: dict[str, Any],
    task: Any,
    folder: RunFolder,
    console: Console,
    code: dict[str, Any],
) -> None:
    try:
        seconds = fit(
            task,
            epochs=config["epochs"],
            folder=folder,
            checkpoint_minutes=config["checkpoint_minutes"],
            report=console,
        )
    finally:
        console.close()
    if rank() == 0:
        for name, state in task.weights().items():
            save_state(folder.path / f"{name}.pt", state)
    started = time.monotonic()
    metrics, evaluation = task.evaluate(
        headline=config["evaluate"],
        settings=config.get("evaluation") or {},
        folder=folder.path,
        console=console,
    )
    if rank() == 0:
        seconds += time.monotonic() - started
        record = _record(config, folder, task, metrics, evaluation, seconds, code)
        path = records.write_record(Path(config["paths"]["results"]) / "runs", record)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        print(f"{console.title}: {shown}; record {path}")


def _assess(
    config: dict[str, Any], task: Any, folder: RunFolder, console: Console, code: dict[str, Any]
) -> None:
    """Measure more on the weights of the run's record; they must be the very ones."""
    measure = configuration.make(config["assessment"])
    path, weights = record_path(config), folder.path / f"{config['evaluate']}.pt"
    if world_size() > 1:
        dist.barrier()  # process 0 has just written the record
    target = records.assessment_path(path, measure.name)
    if target.exists():
        return
    wanted = records.read_record(path)["checkpoint"]["sha256"]
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != wanted:
        state = "are not those of" if weights.is_file() else "are missing for"
        raise RunError(
            f"the weights {weights} {state} the record {path}; bring them back (GKL_OUTPUTS), or move the record away to train anew"
        )
    task.model.load_state_dict(torch.load(weights, map_location=task.device, weights_only=True))
    task.model.float()
    started = time.monotonic()
    metrics, details = measure(
        assess.Subject(
            task.model,
            task.data,
            config.get("evaluation") or {},
            folder.path,
            task.device,
            console,
            task.workers,
        )
    )
    if rank() == 0:
        made = {
            "assessment": measure.name,
            "settings": {k: v for k, v in config["assessment"].items() if k not in ("_target_", "name")},
            "checkpoint": wanted,
            "metrics": metrics,
            "details": details,
            **_provenance(task.device, code, time.monotonic() - started),
        }
        written = records.write_assessment(path, made)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()) or "measured"
        print(f"{console.title}, {measure.name}: {shown}; {written}")


def _record(
    config: dict[str, Any],
    folder: RunFolder,
    task: Any,
    metrics: dict[str, float],
    evaluation: dict[str, Any],
    seconds: float,
    code: dict[str, Any],
) -> dict[str, Any]:
    data, made = task.data, task.training.generated
    published = configuration.published(config)
    original = published["data"]["_target_"].rpartition(".")[2]
    checkpoint = folder.path / f"{config['evaluate']}.pt"
    path = record_path(config)
    history = path.with_suffix(".jsonl")
    write_text(history, folder.history_path.read_text())
    return {
        "schema": 1,
        "experiment": config["experiment"],
        "scale": config["scale"],
        "protocol": config["protocol"],
        "seed": config["seed"],
        "identity": records.identity(config),
        "config": records.without_excluded(config),
        "departures": records.differences(published, config),
        "status": "done",
        "metrics": metrics,
        "evaluation": evaluation,
        "history": history.name,
        "checkpoint": {
            "path": str(checkpoint.relative_to(config["paths"]["outputs"])),
            "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        },
        "data": {
            "name": data.name,
            "stand_in_for": None if data.name == original else original,
            "sha256": data.sha256,
            "train": len(data.train_labels),
            "test": len(data.test_labels),
            **(
                {"generated": {"name": made.name, "sha256": made.sha256, "images": len(made)}} if made else {}
            ),
        },
        **task.origins(),
        **_provenance(task.device, code, seconds),
    }


def _provenance(device: torch.device, code: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Which code, packages and machine made a record, what it cost, and when it was finished."""
    return {
        "code": code,
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "timm", "pyautoattack", "numpy")
        }
        | {"python": sys.version.split()[0]},
        "hardware": {
            "device": device.type,
            "count": world_size(),
            "name": machine_name(device),
        },
        "cost": {
            "seconds": round(seconds, 1),
            "device_hours": round(seconds * world_size() / 3600, 4),
            "peak_memory_bytes": _peak_memory(device),
        },
        "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _code() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changed = ["git", "status", "--porcelain", "--", "gkl", "trainers", "configs", "scripts"]
        status = subprocess.run(changed, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def machine_name(device: torch.device) -> str:
    """What records call a device: the card, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
        elastic_launch(launch_config, sys.executable)("-m", "trainers.run", str(path))
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
        os.execv(sys.executable, [sys.executable, "-m", "trainers.run", str(path), *again])
    return 0


def main(arguments: list[str]) -> int:
    """Command line of one run. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainers.run", exit_on_error=False)
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
        raise ConfigError(f"usage: python -m trainers.run CONFIG.yaml; {error}") from None
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(given.config)))
    if "WORLD_SIZE" not in os.environ and config["devices"] * given.nodes > 1:
        return launch(given.config, config["devices"], given)
    with process_group(config):
        if rank() == 0:
            with run_folder(config).locked():
                run(config)
        else:
            run(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
