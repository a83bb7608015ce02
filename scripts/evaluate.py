"""Clean accuracy and AutoAttack of any checkpoint: ours, the authors', RobustBench's.

    python scripts/evaluate.py checkpoint=outputs/.../swa.pt model=wrn_34_10 data=cifar100
    python scripts/evaluate.py checkpoint=... model=wrn_10_1 data=digits evaluation.epsilon=0.15 evaluation=screen
    python scripts/evaluate.py published=Cui2023Decoupled_WRN-34-10_cifar100 [checkpoint=file]     # configs/published

Finished batches are kept beside the checkpoint's name under GKL_OUTPUTS: the same command goes on where it was stopped.
With torchrun in front it shares the batches over several devices.
"""

import trainers.interrupt  # noqa: F401

import hashlib
import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from gkl.atomic import atomically
from gkl.data.dense import DenseData
from gkl.evaluation.chosen import chosen
from gkl.models import load_checkpoint
from gkl.models.checkpoint_files import some
from gkl.models.normalise import taken
from gkl.models.own import check_answers
from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.loop.accuracy import autoattack, clean_accuracy
from trainers.loop.console import Console
from trainers.runs.compose import choices, compose
from trainers.runs.processes import device_of, process_group
from trainers.runs.settings import check_sections, doubtful_radii
from trainers.runs.targets import CONFIGS, instantiate, unknown


def main(arguments: list[str]) -> int:
    """Compose, check, load, evaluate, print. Returns the exit code."""
    own = any(a.startswith("checkpoint=") for a in arguments)
    arguments, published = with_published(arguments)
    config = compose("evaluate", arguments)
    check_sections(config)
    path = Path(str(config["checkpoint"]))
    if published and not own and not path.exists():
        fetch(published["url"], path)
    if not path.is_file():
        raise ConfigError(
            f"no checkpoint at {path}{' but a folder' if path.is_dir() else ''}; set checkpoint=... to a .pt, .pth or .safetensors file"
        )
    with process_group(config):
        first = os.environ.get("RANK", "0") == "0"
        device = device_of(config)
        console = Console(path.name, enabled=first)
        data = instantiate(config["data"])
        if isinstance(data, DenseData):
            raise ConfigError(
                f"{data.name} has a label for each pixel, which AutoAttack does not take; choose data of one label a picture: data=..."
            )
        if noticed := getattr(data, "noticed", None):
            console.warn(noticed)
        try:
            model = loaded(config, data, path, console)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        model.to(device).eval()
        folder = (
            Path(config["paths"]["outputs"])
            / "evaluations"
            / hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        )
        clean = clean_accuracy(model, data, device)
        console.say(f"clean accuracy {clean:.2f} % of {len(data.test_labels)} images of {data.name}")
        if clean < 50.0 / data.num_classes:  # fewer than a guess gets: it knows the pictures by other names
            console.say(
                f"warning: that is less than guessing; its classes may stand in another order than here, {some(data.class_names)}"
            )
        for line in doubtful_radii(config):
            console.warn(line)
        metrics, details = autoattack(
            model, data, config["evaluation"], folder=folder, device=device, console=console
        )
        if first:
            found = {"checkpoint": path.name, "data": data.name, "clean": clean, **metrics, **details}
            if published:
                found["published"] = {name: published[name] for name in ("clean", "aa")}
            print(json.dumps(found, indent=1))
    return 0


def loaded(config: dict[str, Any], data: Any, path: Path, console: Console) -> nn.Module:
    """The network with its weights, after saying how they were found. Raises ValueError for what AutoAttack cannot measure."""
    model: nn.Module = instantiate(config["model"], num_classes=data.num_classes)
    chosen(data, config["evaluation"]["images"])  # that they are there
    if not hasattr(model, "get_classifier"):
        raise ValueError(
            f"AutoAttack asks a network for a picture's class, and a {type(model).__name__} gives none; choose model=... of a classifier"
        )
    check_answers(model, data.image_size, evaluated=True)
    key = config["checkpoint_key"]
    report = load_checkpoint(model, path, None if key is None else str(key))
    console.say(str(report))
    if not report.normalised:
        console.say(taken(model, "model"))
    return model


def with_published(arguments: list[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The arguments with what configs/published says of published=NAME put first, and that file."""
    names = [a.split("=", 1)[1] for a in arguments if a.startswith("published=")]
    if not names:
        return arguments, None
    if names[0] not in choices("published"):
        raise ConfigError(unknown("published checkpoint", names[0], choices("published")))
    file = OmegaConf.to_container(OmegaConf.load(CONFIGS / "published" / f"{names[0]}.yaml"))
    assert isinstance(file, dict)
    outputs = os.environ.get("GKL_OUTPUTS", "outputs")
    own = [*file["overrides"], f"checkpoint={outputs}/checkpoints/{names[0]}.pt"]
    rest = [a for a in arguments if not a.startswith("published=")]
    given = {a.split("=", 1)[0] for a in rest}
    return [*(a for a in own if a.split("=", 1)[0] not in given), *rest], {str(k): v for k, v in file.items()}


def fetch(url: str, path: Path) -> None:
    """Download a published checkpoint to its place, whole or not at all. Raises ConfigError saying what to do instead."""
    try:
        with atomically(path) as temporary:
            with urllib.request.urlopen(url, timeout=60) as answer, open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file)
            with open(temporary, "rb") as file:
                if file.read(1) == b"<":
                    raise OSError("the answer is a web page, not a checkpoint")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no checkpoint at {path} and {url} cannot be read ({error}); download it by hand and pass checkpoint=FILE"
        ) from error


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
