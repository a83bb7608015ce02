"""From what a person types to one checked, resolved configuration; composed once, before anything expensive.

    config = compose("train", ["experiment=at/c100_basic_gkl", "scale=smoke", "seed=1"])
    task = build(config, device=device)

Hydra composes and `_target_`s name only `gkl` and `trainers`. What a person can get wrong ends in a ConfigError of one line.
"""

import copy
import difflib
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainers.folder import RunError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# The settings of a run that no `_target_` receives under its own name, with their types.
SETTINGS: dict[str, Any] = {
    "seed": int,
    "epochs": int,
    "batch_size": int,
    "drop_last": bool,
    "bn_groups": int,
    "precision": typing.Literal["float32", "tf32", "bf16", "fp16", "float64"],
    "channels_last": bool,
    "compile": bool,
    "graph": bool | typing.Literal["auto"],
    "evaluate": str,
    "generated_share": float | None,
    "held_out": float | None,
    "held_out_by_class": bool | None,
    "checkpoint_minutes": float,
    "devices": int,
    "accumulate": int,
    "workers": int | typing.Literal["auto"],
    "device": typing.Literal["auto", "cpu", "cuda"],
}


class ConfigError(RunError):
    """A configuration that cannot be run, in one line: what was needed, what came, what to do."""


def register_resolvers() -> None:
    """The interpolations our YAML files use, but for at_scale, which each composition sets."""

    def by_protocol(choices: Mapping[str, Any], *, _root_: DictConfig) -> Any:
        return choices[_root_.protocol]

    def scaled(epoch: int, of: int = 200, *, _root_: DictConfig) -> int:
        return max(1, round(epoch * _root_.epochs / of))

    def by_model(choices: Mapping[str, Any], *, _root_: DictConfig) -> Any:
        return choices.get(_root_.model.name, choices["else"])

    def by_pair(choices: Mapping[str, Any], *, _root_: DictConfig) -> Any:
        if _root_.get("pair") not in choices:
            raise ValueError(unknown("pair for this experiment", str(_root_.get("pair")), list(choices)))
        return choices[_root_.pair]

    def per_class(weight: float, *, _root_: DictConfig) -> float:
        return weight * (_root_.class_share or 1.0)

    OmegaConf.register_new_resolver("px", lambda levels: levels / 255, replace=True)
    OmegaConf.register_new_resolver("by_protocol", by_protocol, replace=True)
    for resolver in (scaled, by_model, by_pair, per_class):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def choices(group: str) -> list[str]:
    """Names in a configuration group, subfolders included: "at/c100_basic_gkl"; what they are based on left out."""
    root = CONFIGS / group
    return sorted(
        str(p.relative_to(root).with_suffix(""))
        for p in root.rglob("*.yaml")
        if p.stem != "base" and not p.stem.endswith("_base")
    )


def completed(experiment: str) -> list[str]:
    """What Hydra understands of an experiment's whole name: "kd/c100_gkl/vgg13_vgg8" is that experiment with that pair.

    An experiment that serves many networks is completed by a name of the group it gives as `completed_by`.
    """
    stem, _, name = experiment.rpartition("/")
    if group := completed_by(stem):
        if name not in choices(group):
            raise ConfigError(unknown(group, name, choices(group)))
        return [f"experiment={stem}", f"{group}={name}"]
    return [f"experiment={experiment}"]


@cache
def completed_by(experiment: str) -> str | None:
    """The group whose choices complete an experiment's name, None for one that is whole or does not exist."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
    return content.get("completed_by") if isinstance(content, dict) else None


def compose(entry: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of configs/<entry>.yaml with overrides applied, as plain dicts and lists.

    Adds `experiment`, its whole name, and `scale`. Raises ConfigError.
    """
    folders = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("GKL_")))
    words = [
        word
        for o in overrides
        for word in (completed(o.removeprefix("experiment=")) if o.startswith("experiment=") else [o])
    ]
    return copy.deepcopy(_composed(entry, tuple(words), folders))


@cache
def _composed(entry: str, overrides: tuple[str, ...], folders: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """compose, once for the same words and folders: a table asks for its rows' configurations again and again."""
    register_resolvers()
    try:
        _check_grammar(overrides)
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = hydra.compose(entry, list(overrides), return_hydra_config=True)
        chosen = OmegaConf.to_container(config.hydra.runtime.choices)
        assert isinstance(chosen, dict)
        group = config.get("completed_by")
        if group and not chosen.get(group):
            raise ConfigError(f"{group}=... is missing; one of: {', '.join(choices(group))}")
        scale = chosen.get("scale", "paper")
        OmegaConf.register_new_resolver("at_scale", lambda choices: choices[scale], replace=True)
        for name, annotation in SETTINGS.items():
            plain = (
                name in config
                and not OmegaConf.is_missing(config, name)
                and not OmegaConf.is_interpolation(config, name)
            )
            if plain and not _fits(config[name], annotation):
                raise ConfigError(_mistyped(name, annotation, config[name]))
        resolved = OmegaConf.to_container(_without_hydra(config), resolve=True, throw_on_missing=True)
    except (
        HydraException,
        OmegaConfBaseException,
        ValueError,
    ) as error:  # ValueError: a group set to a number
        raise ConfigError(_explain(entry, str(error), overrides)) from None
    assert isinstance(resolved, dict)
    names = {key: chosen[key] for key in ("experiment", "scale") if key in chosen}
    if resolved.pop("completed_by", None):
        names["experiment"] += f"/{chosen[group]}"
    return {**names, **resolved}


def _without_hydra(config: DictConfig) -> DictConfig:
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config


def _check_grammar(overrides: Sequence[str]) -> None:
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line!r} names several values; one run takes one value each")


def _explain(entry: str, message: str, overrides: Sequence[str]) -> str:
    """Hydra's many-lined errors as one line with a remedy."""
    if match := re.search(r"Could not find '([\w/@.-]+)'|Could not load '([\w/@.-]+)'", message):
        wanted = next(name for name in match.groups() if name)
        group, _, name = wanted.partition("/")
        return unknown(group, name, choices(group))
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", message):
        key = next(name for name in match.groups() if name)
        typed = next((o for o in overrides if re.split("[=@]", o)[0].lstrip("+~").endswith(key)), key)
        return f"there is no setting {key!r} (from {typed!r}){_closest(key.split('.')[-1], _all_keys(entry))}"
    if match := re.search(r"You must specify '([^']+)', e\.g", message):
        group = match[1]
        return f"{group}=... is missing; one of: {', '.join(choices(group))}"
    if match := re.search(r"Missing mandatory value: ([\w.]+)", message):
        return f"{match[1]}=... is missing: the experiment leaves it open, give it on the command line"
    return "cannot read the overrides: " + " ".join(message.split())


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """One line for a name that does not exist."""
    return f"unknown {kind} {name!r}{_closest(name, known)}; there are: {', '.join(known)}"


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _all_keys(entry: str) -> list[str]:
    keys: set[str] = set()
    for path in CONFIGS.rglob("*.yaml"):
        keys.update(re.findall(r"^\s*([A-Za-z]\w*):", path.read_text(), flags=re.MULTILINE))
    return sorted(keys)


def check_values(config: Mapping[str, Any]) -> None:
    """Every `_target_` exists and takes the keys and types it is given. Raises ConfigError."""
    for name, node in config.items():
        _check_targets(node, name)


def check(config: Mapping[str, Any], world_size: int) -> None:
    """Everything that can be known wrong before data is read or a network built. Raises ConfigError."""
    check_values(config)
    _check_parts(config)
    batch_size, groups = config["batch_size"], config["bn_groups"]
    for name in ("epochs", "batch_size", "bn_groups", "devices", "accumulate"):
        if config[name] < 1:
            raise ConfigError(f"{name} must be at least 1, got {config[name]}")
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size={batch_size} cannot be shared by {world_size} processes; choose devices= a divisor of it"
        )
    if groups % world_size or batch_size % groups:
        raise ConfigError(
            f"bn_groups={groups} must be a multiple of devices={world_size} and divide batch_size={batch_size}: "
            f"each process normalises whole groups; set bn_groups={world_size} to give each device its own batch norm"
        )
    if groups // world_size % config["accumulate"]:
        raise ConfigError(
            f"accumulate={config['accumulate']} must divide the {groups // world_size} batch-norm groups of a process "
            f"(bn_groups={groups}, devices={world_size}): each turn normalises whole groups; choose a divisor, or more bn_groups"
        )
    if config["workers"] != "auto" and config["workers"] < 0:
        raise ConfigError(f"workers must be auto or a number from 0, got {config['workers']}")
    known = [
        "last",
        *config["averages"],
        *(["best"] if config["selection"] or "attack" not in config else []),
    ]
    if config["evaluate"] not in known:
        raise ConfigError(unknown("evaluate", config["evaluate"], known))
    if config["selection"] and config["selection"].get("weights", "last") not in (
        "last",
        *config["averages"],
    ):
        raise ConfigError(
            unknown("selection.weights", config["selection"]["weights"], ["last", *config["averages"]])
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


def _check_targets(node: Any, where: str) -> None:
    """Every `_target_` exists in gkl or trainers, takes the keys it is given, and of the types they have."""
    if isinstance(node, list):
        for number, child in enumerate(node):
            _check_targets(child, f"{where}[{number}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        target = locate(node["_target_"], where)
        parameters, hints = parameters_of(target)
        for key, value in node.items():
            if key in ("_target_", "_partial_"):
                continue
            if key not in parameters:
                raise ConfigError(
                    f"{node['_target_']} takes no {where}.{key}{_closest(key, list(parameters))}"
                )
            if not (isinstance(value, dict) and "_target_" in value) and not _fits(
                value, hints.get(key, Any)
            ):
                raise ConfigError(_mistyped(f"{where}.{key}", hints[key], value))
    for key, child in node.items():
        _check_targets(child, f"{where}.{key}")


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters of a function or class by name, and their types; `**common` stands for the base class's own."""
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)]
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for function in functions:
        signature = inspect.signature(function).parameters
        hints = {**typing.get_type_hints(function), **hints}
        named = {n: p for n, p in signature.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        parameters = {**named, **parameters}
        if len(named) == len(signature):
            break
    parameters.pop("self", None)
    return parameters, hints


def locate(target: str, where: str = "_target_") -> Callable[..., Any]:
    """The object a `_target_` names, in gkl or trainers and nowhere else."""
    module, _, name = target.rpartition(".")
    if module.split(".")[0] not in ("gkl", "trainers"):
        raise ConfigError(
            f"{where} names {target!r}; configurations may only name objects of gkl and trainers"
        )
    try:
        return typing.cast(Callable[..., Any], getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError):
        raise ConfigError(f"{where} names {target!r}, which does not exist") from None


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is inspect.Parameter.empty:
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool):
        return isinstance(value, annotation)
    if annotation is Path:
        return isinstance(value, str)
    if origin in (Sequence, list, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value if arguments)
    return True  # objects are built by their own `_target_`


def _mistyped(name: str, annotation: Any, value: Any) -> str:
    wanted = annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")
    return f"{name} must be {wanted}, got {value!r} ({type(value).__name__})"


def parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The top-level entries that the method's constructor asks for by name."""
    parameters, _ = parameters_of(locate(config["method"]["_target_"]))
    return {name: node for name, node in config.items() if name in parameters}


def _check_parts(config: Mapping[str, Any]) -> None:
    parameters, _ = parameters_of(locate(config["method"]["_target_"], "method"))
    given = {*config, *config["method"], "device"}
    idle = [
        n
        for n, node in config.items()
        if isinstance(node, dict) and "_target_" in node and n not in parameters
    ]
    if idle := [n for n in idle if n not in ("method", "assessment", "launcher")]:
        raise ConfigError(
            f"{config['method']['_target_']} takes no {idle[0]}; leave it out or set {idle[0]}: null"
        )
    missing = [n for n, p in parameters.items() if n not in given and p.default is inspect.Parameter.empty]
    if missing:
        raise ConfigError(
            f"{config['method']['_target_']} also needs {', '.join(missing)}: choose them as {missing[0]}=..."
        )


def build(config: Mapping[str, Any], **given: Any) -> Any:
    """The task of a configuration: its parts, each from its own `_target_`, handed to the method.

    given: objects that do not come from the configuration (device), or that are built already (data, model).
    """
    made = {name: make(node) for name, node in parts(config).items() if name not in given}
    return make(config["method"], **{**made, **given})


def make(node: Any, **given: Any) -> Any:
    """The object that a checked node describes; plain values are themselves. Raises ConfigError for bad values."""
    if not isinstance(node, dict):
        return node
    try:
        if given:  # by way of a partial: handed to Hydra, a data class would come out as a dict
            return instantiate({**node, "_partial_": True}, _convert_="all")(**given)
        return instantiate(node, _convert_="all")
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | FileNotFoundError):
            raise ConfigError(str(cause)) from cause
        raise (cause or error) from None


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same experiment as the paper ran it: scale=paper, no overrides."""
    return compose(
        "train", [f"experiment={config['experiment']}", f"protocol={config['protocol']}", "scale=paper"]
    )
