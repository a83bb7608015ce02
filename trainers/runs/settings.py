"""What a run's configuration may hold, and what is built from it: parts by their sections, settings by their types.

check(config, world_size)
training = build(config, device=device)
"""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gkl.attacks.pgd import Norm, check_radius, doubtful
from gkl.evaluation.autoattack import Version
from gkl.evaluation.chosen import Chosen
from gkl.models.normalise import mean_and_std
from gkl.models.own import check_answers
from trainers.errors import ConfigError
from trainers.loop.setup import Setup
from trainers.loop.training import Training
from trainers.runs.ranges import check_ranges
from trainers.runs.targets import (
    check_values,
    fits,
    instantiate,
    locate,
    mistyped,
    parameters_of,
    unknown,
)

SETUP = {field.name: field for field in dataclasses.fields(Setup)}
# Sections of a configuration that describe the run around a training.
AROUND = ("method", "launcher", "assessment", "evaluation")
# Plain settings at the top of a configuration and their types: a Setup's, and those of the run around it.
SETTINGS: dict[str, Any] = {
    name: hint
    for name, hint in typing.get_type_hints(Setup).items()
    if name not in ("data", "model", "augment", "averages")
} | {
    "evaluate": str,
    "checkpoint_minutes": float,
    "devices": int,
    "device": typing.Literal["auto", "cpu", "cuda"],
}
# What the sections hold that build no part, and its types.
SECTIONS: dict[str, dict[str, Any]] = {
    "evaluation": {
        "version": Version,
        "norm": Norm,
        "epsilon": float,
        "images": Chosen,
        "batch_size": int,
        "seed": int,
    },
    "logger": {
        "mode": typing.Literal["online", "offline", "off"],
        "project": str,
        "entity": str | None,
        "table": str | None,
        "row": str | None,
        "patience": float,
    },
    "paths": {"outputs": str, "results": str},
}
# Beside these and the parts that a method takes: which run it is, and what other settings follow from.
NAMES = ("experiment", "scale", "protocol", "seed", "overrides", "class_share")
DEFAULTS = {name: field.default for name, field in SETUP.items() if field.default is not dataclasses.MISSING}


def check(config: Mapping[str, Any], world_size: int) -> None:
    """Everything that can be known wrong before data is read or a network built. Raises ConfigError."""
    needed = [name for name, field in SETUP.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in (*needed, *AROUND[:-2], "paths", "logger") if config.get(name) is None]:
        raise ConfigError(
            f"the configuration lacks {', '.join(missing)}; leave out ~{missing[0]} or {missing[0]}=null"
        )
    if missing := [name for name in SECTIONS["paths"] if name not in config["paths"]]:
        raise ConfigError(f"the configuration lacks paths.{missing[0]}; leave out ~paths.{missing[0]}")
    check_sections(config)
    if any(word.lstrip("+").startswith("assessment.name=") for word in config["overrides"]):
        raise ConfigError(
            "assessment.name is where tables look for its numbers; leave it, or write a file of configs/assessment"
        )
    _check_parts(config)
    _check_assessment(config)
    check_radii(config)
    _check_batch(config, world_size)
    selection = config.get("selection")
    keeps_best = selection or getattr(locate(config["method"]["_target_"]), "keeps_best", False)
    known = ["last", *config["averages"], *(["best"] if keeps_best else [])]
    if config["evaluate"] not in known:
        raise ConfigError(unknown("evaluate", config["evaluate"], known))
    known = ["last", *config["averages"]]
    if selection and selection.get("weights", "last") not in known:
        raise ConfigError(unknown("selection.weights", selection["weights"], known))
    for key, name in (
        ("evaluate", config["evaluate"]),
        ("selection.weights", (selection or {}).get("weights")),
    ):
        average = config["averages"].get(name) or {}
        if average and (start := average.get("start_epoch", 1)) > config["epochs"]:
            raise ConfigError(
                f"{key}={name}: averages.{name}.start_epoch={start} is past the last epoch, {config['epochs']}; "
                "there would be no such weights"
            )


def check_sections(config: Mapping[str, Any]) -> None:
    """Every part takes its settings, every number lies in its range. Raises ConfigError."""
    check_values(config)
    check_ranges(config)
    if config.get("epochs") == 0 and not config.get("initial"):  # weights that are there can be measured
        raise ConfigError("epochs must be at least 1, got 0")
    for name, types in SECTIONS.items():
        if config.get(name):
            _check_section(name, config[name], types)
    _check_networks(config)


def _check_assessment(config: Mapping[str, Any]) -> None:
    """That an assessment has a classifier to measure, and one which attacks is told how."""
    node = config.get("assessment")
    if node and not locate(config["method"]["_target_"]).classifies:  # type: ignore[attr-defined]
        raise ConfigError(
            f"assessment={node['name']} measures a classifier, and {config['experiment']} trains none; leave it out"
        )
    if node and locate(node["_target_"]).attacks and not config.get("evaluation"):  # type: ignore[attr-defined]
        raise ConfigError(
            f"assessment={node['name']} attacks as the section evaluation says, and {config['experiment']} has none; assess an adversarial training"
        )


def check_radii(config: Mapping[str, Any], numbers: int | None = None) -> None:
    """That every attack's radius is one for pictures of so many numbers, those of an assessment included. Raises ConfigError."""
    attacks = {key: config[key] for key in ("attack", "evaluation") if "epsilon" in (config.get(key) or {})}
    radii = [(f"{key}.epsilon", node["norm"], node["epsilon"]) for key, node in attacks.items()]
    for eighths in (config.get("assessment") or {}).get("eighths", ()):
        node = config["evaluation"]
        radii.append(
            (f"{eighths} eighths of evaluation.epsilon", node["norm"], node["epsilon"] * eighths / 8)
        )
    try:
        for name, norm, epsilon in radii:
            check_radius(norm, epsilon, numbers, name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def doubtful_radii(config: Mapping[str, Any]) -> list[str]:
    """A line on each attack whose radius is most likely meant in another norm."""
    attacks = {key: config[key] for key in ("attack", "evaluation") if "epsilon" in (config.get(key) or {})}
    lines = (doubtful(node["norm"], node["epsilon"], f"{key}.epsilon") for key, node in attacks.items())
    return [line for line in lines if line]


def _check_networks(node: Any, where: str = "") -> None:
    """That every network's normalisation is one, and every checkpoint that a training begins from there."""
    for name, child in node.items() if isinstance(node, Mapping) else ():
        place = f"{where}.{name}".lstrip(".")
        if name == "normalisation" and child not in (None, "none"):
            try:
                mean_and_std(child)
            except ValueError as error:
                raise ConfigError(f"{place}: {error}") from error
        if name == "checkpoint" and where and child is not None and not Path(child).is_file():
            raise ConfigError(
                f"no checkpoint at {child}; set {place}=... to a .pt, .pth or .safetensors file"
            )
        _check_networks(child, place)


def _check_section(section: str, found: Any, types: Mapping[str, Any]) -> None:
    """That a section which builds no part has its settings and no others: most are read when the training is over."""
    if not isinstance(found, Mapping):
        raise ConfigError(f"{section} has the settings {', '.join(types)}, got {found!r}")
    for name, value in found.items():
        if name not in types:
            raise ConfigError(unknown("setting", f"{section}.{name}", [f"{section}.{n}" for n in types]))
        if not fits(value, types[name]):
            hint = "; null takes all" if name == "images" else ""
            raise ConfigError(mistyped(f"{section}.{name}", types[name], value) + hint)
    if missing := [name for name in types if name not in found and section != "paths"]:
        raise ConfigError(f"{section} also needs {', '.join(missing)}: choose a file of configs/{section}")


def _check_batch(config: Mapping[str, Any], world_size: int) -> None:
    """That a batch can be shared by so many processes, in whole batch-norm groups."""
    batch_size, groups = config["batch_size"], config["bn_groups"]
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size={batch_size} cannot be shared by {world_size} processes; choose devices= a divisor of it"
        )
    method: Any = locate(config["method"]["_target_"])
    shared = method.groups_reach_over_devices and world_size % groups == 0
    if (groups % world_size and not shared) or batch_size % groups:
        either = "a multiple or a divisor" if method.groups_reach_over_devices else "a multiple"
        raise ConfigError(
            f"bn_groups={groups} must be {either} of devices={world_size} and divide batch_size={batch_size}; "
            f"set bn_groups={world_size} to give each device its own batch norm"
        )
    if groups // world_size % config["accumulate"]:
        raise ConfigError(
            f"accumulate={config['accumulate']} must divide the {groups // world_size} batch-norm groups of a process "
            f"(bn_groups={groups}, devices={world_size}): each micro-batch has whole groups; choose a divisor, or more bn_groups"
        )


def check_machine(config: Mapping[str, Any]) -> None:
    """That this machine can carry the run: a GPU for scale=paper, as many GPUs as devices. Raises ConfigError."""
    gpus = torch.cuda.device_count()
    if config["scale"] == "paper" and config["device"] == "auto" and not gpus:
        raise ConfigError(
            "scale=paper needs a GPU and torch sees none; try scale=smoke (minutes on two cores) or scale=small, "
            "plan=true for what it costs, or device=cpu to run it here all the same"
        )
    if gpus and config["device"] != "cpu" and config["devices"] > gpus:
        raise ConfigError(
            f"devices={config['devices']} but torch sees {gpus} GPUs; set devices={gpus} or fewer"
        )


def _check_parts(config: Mapping[str, Any]) -> None:
    """That the method gets every part it needs, and each part there is has someone who takes it."""
    name = config["method"]["_target_"]
    parameters, _ = parameters_of(name)
    taken = {*parameters, *SETUP, *AROUND, *SETTINGS, *SECTIONS, *NAMES}
    for part, node in config.items():
        if node is not None and part not in taken:
            raise ConfigError(f"{name} takes no {part}; leave it out or set {part}: null")
        if part in parameters or part in SETUP:
            if isinstance(node, dict) and "_target_" not in node and part != "averages":
                left = f", and {', '.join(node)} alone make none" if node else ""
                raise ConfigError(f"{part} is not chosen{left}; choose {part}=..., or leave out ~{part}")
    for average, node in config["averages"].items():
        if not (isinstance(node, dict) and "_target_" in node):
            raise ConfigError(f"averages.{average} must be an average of configs/averages, got {node!r}")
    needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    missing = [n for n in needed if n not in config["method"] and config.get(n) is None]
    if missing:
        raise ConfigError(f"{name} also needs {', '.join(missing)}: choose them as {missing[0]}=...")


def build(config: Mapping[str, Any], *, device: torch.device, **given: Any) -> Training:
    """The training of a configuration: its setup and its method, each part from its own `_target_`. Raises ConfigError, ValueError.

    given: parts that are built already (data, model).
    """
    setup = {
        name: instantiate(node)
        for name, node in config.items()
        if name in SETUP and name != "model" and name not in given
    }
    setup["seed"], setup["device"] = config["seed"], device
    parameters, _ = parameters_of(config["method"]["_target_"])
    parts = {
        name: instantiate(node) for name, node in config.items() if name in parameters and name not in given
    }
    parts |= {name: given.pop(name) for name in list(given) if name in parameters}
    if "model" not in given:
        given["model"] = instantiate(config["model"], num_classes=given["data"].num_classes)
    check_answers(given["model"], given["data"].image_size, attacked="attack" in config, trained=True)
    return Training(Setup(**{**setup, **given}), instantiate(config["method"], **parts))
