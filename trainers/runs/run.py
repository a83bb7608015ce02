"""One run from its frozen configuration: train, evaluate, write the record. Started by python -m trainers.runs."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gkl.atomic import clear
from gkl.distributed import rank, world_size
from gkl.evaluation.autoattack import FEWEST_CLASSES
from gkl.evaluation.chosen import chosen
from trainers.errors import ConfigError, RunError
from trainers.files import save_state
from trainers.loop.console import Console
from trainers.loop.engine import fit
from trainers.loop.folder import RunFolder
from trainers.methods.assessments import Subject
from trainers.runs import records
from trainers.runs.compose import published, usual
from trainers.runs.identity import asked, assessed_with, config_hash, differences, without_excluded
from trainers.runs.paths import record_path, run_folder
from trainers.runs.processes import check_shared, device_of, one_process_a_node_first
from trainers.runs.provenance import code_state, provenance
from trainers.runs.settings import build, check, check_radii, doubtful_radii
from trainers.runs.targets import instantiate
from trainers.runs.wandb_mirror import Mirror

STOPPED_SECONDS = (
    2.0  # that a run which was stopped gives wandb: the rest of its grace is the next checkpoint's
)


def run(config: dict[str, Any]) -> None:
    """Train, evaluate, record, and make the assessment asked for; what has its record already is not done again.

    On every process of the run. Raises RunError, Interrupted.
    """
    check(config, world_size())
    device, code = device_of(config), code_state()  # as it is now: the files may change while the run goes on
    folder = run_folder(config)
    title = f"{config['experiment']} seed {config['seed']}"
    console = Console(title, enabled=rank() == 0, folder=folder.path)
    torch.manual_seed(config["seed"])
    if config["compile"]:  # once: the next start finds it there
        os.environ.setdefault(
            "TORCHINDUCTOR_CACHE_DIR", str(Path(config["paths"]["outputs"]).resolve() / "compiled")
        )
    check_shared([folder.path, Path(config["paths"]["results"])])
    if rank() == 0:
        folder.clear()
        clear(record_path(config).parent, f".seed{config['seed']}.json*")
    done = records.is_whole(record_path(config))
    if world_size() > 1:
        dist.barrier()  # none may write the record before all have looked for it
    with one_process_a_node_first():
        data = instantiate(config["data"])
        if noticed := getattr(data, "noticed", None):
            console.warn(noticed)
        for line in doubtful_radii(config):
            console.warn(line)
        if config.get("evaluation") and data.num_classes < FEWEST_CLASSES:
            raise ConfigError(
                f"{data.name} has {data.num_classes} classes, and AutoAttack's targeted DLR loss needs at least {FEWEST_CLASSES}: "
                "adversarial training here ends with AutoAttack; take data of more classes"
            )
        check_radii(config, 3 * data.image_size**2)
        model = instantiate(config["model"], num_classes=data.num_classes)
        try:
            if config.get("evaluation"):
                chosen(data, config["evaluation"]["images"])  # that they are there
            task = build(config, device=device, data=data, model=model)
            if config.get("assessment"):
                assessment = instantiate(config["assessment"])
                assessment.check()
                assessment.check_data(data)
                assessment.check_network(model)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error
    task.say = console.say
    if noticed := getattr(task.batches, "noticed", None):
        console.warn(noticed)
    for module in (m for network in (model, *task.method.networks()) for m in network.modules()):
        if begun := module.__dict__.pop("begun", None):
            console.say(begun)
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
            "id": f"{config_hash(config)}-seed{config['seed']}",
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
    metrics, evaluation = task.method.evaluate(
        headline=config["evaluate"],
        settings=config.get("evaluation") or {},
        folder=folder.path,
        console=console,
    )
    if rank() == 0:
        seconds += time.monotonic() - started
        record = _record(config, folder, task, metrics, evaluation, seconds, code)
        folder.check_history(config["epochs"] + 1)
        history = folder.history_path.read_text(encoding="utf-8")
        path = records.write_record(Path(config["paths"]["results"]) / "runs", record, history)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        print(f"{console.title}: {shown}; record {path}")


def _assess(
    config: dict[str, Any], task: Any, folder: RunFolder, console: Console, code: dict[str, Any]
) -> None:
    """Measure more on the weights of the run's record; they must be the very ones."""
    measure = instantiate(config["assessment"])
    path, weights = record_path(config), folder.path / f"{config['evaluate']}.pt"
    if world_size() > 1:
        dist.barrier()  # process 0 has just written the record
    target = records.assessment_path(path, measure.name)
    if records.is_whole(target, records.validate_assessment):
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
        Subject(
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
            "settings": assessed_with(config),
            "checkpoint": wanted,
            "metrics": metrics,
            "details": details,
            **provenance(task.device, code, time.monotonic() - started),
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
    data, made = task.data, task.batches.generated
    paper = published(config)
    original = paper["data"]["_target_"].rpartition("/")[2]
    checkpoint = folder.path / f"{config['evaluate']}.pt"
    return {
        "schema": records.SCHEMA,
        "experiment": config["experiment"],
        "scale": config["scale"],
        "protocol": config["protocol"],
        "seed": config["seed"],
        "config_hash": config_hash(config),
        "config": without_excluded(config),
        "overrides": asked(config["overrides"]),
        "changed": {key: value for key, (_, value) in differences(usual(config), config).items()},
        "departures": differences(paper, config),
        "status": "done",
        "metrics": metrics,
        "evaluation": evaluation,
        "history": record_path(config).with_suffix(".jsonl").name,
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
        **task.method.origins(),
        **provenance(task.device, code, seconds),
    }
