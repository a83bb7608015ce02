"""What makes two runs the same run: a hash of everything in a configuration that changes what is computed.

config_hash(config)                  # "9c2ecd61d7d1": what was computed, the measurement included
training_hash(config)                # "51d0c3f0a9be": the weights alone
differences(usual, config)           # {"loss.gamma": [0.4, 0.2]}
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from trainers.runs.settings import DEFAULTS
from trainers.runs.targets import parameters_of

# Top-level settings that do not change what is computed: a run has one hash wherever and however often it runs.
EXCLUDED = (
    "seed",
    "paths",
    "device",
    "devices",
    "accumulate",
    "workers",
    "graph",
    "logger",
    "launcher",
    "checkpoint_minutes",
    "experiment",
    "scale",
    "protocol",
    "assessment",
    "overrides",
)
# How the weights are measured when the training is over: another measurement takes the same weights.
MEASUREMENT = ("evaluation", "evaluate")
MEASURED_WITH = {  # of other sections, what is read in a run's measurement alone
    "data": ("tests", "long_side", "asked"),  # of CLIP, segmentation, LLaVA
    "method": ("mirrored", "longest_answer"),
}
FREE = ("options", "timm_options")  # of a network: what these names mean there is its own affair
EXCLUDED_ANYWHERE = ("root", "mirror", "download", "folder", "outputs", "record", "cache", "checkpoint")
PLACES = {"lists": "data/ImageNet_LT"}  # places that once counted: as the usual one, wherever they are
CONTENTS = ("content", "lists_content")  # what is known of data once they are there


def without_excluded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration without seed, paths, devices and logging, as a record holds it."""

    def clean(node: Any) -> Any:
        if isinstance(node, Mapping):
            kept = {
                key: value if key in FREE else clean(value)
                for key, value in node.items()
                if key not in EXCLUDED_ANYWHERE
            }
            return kept | {key: place for key, place in PLACES.items() if key in kept}
        return [clean(value) for value in node] if isinstance(node, list) else node

    return {key: clean(value) for key, value in config.items() if key not in EXCLUDED}


def assessed_with(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration's assessment, as what it measures keeps them: without places."""
    return {
        key: value
        for key, value in config["assessment"].items()
        if key not in ("_target_", "name", *EXCLUDED_ANYWHERE)
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that stand for a resolved configuration: the same mathematics has the same ones.

    What equals its default does not count, so that a setting added later, with the old behaviour as its default, leaves the runs
    before it their hash. Parts count by their names, wherever their classes lie.
    """

    def canonical(node: Any, defaults: Mapping[str, Any]) -> Any:
        if isinstance(node, Mapping):
            known = _defaults(node["_target_"]) if "_target_" in node else defaults
            found = {key: canonical(value, {}) for key, value in node.items()}
            return {k: v for k, v in found.items() if v != canonical(known.get(k), {})}
        if isinstance(node, list | tuple):
            return [canonical(value, {}) for value in node]
        if isinstance(node, int | float) and not isinstance(node, bool):
            return f"{node:.12g}"  # 4 and 4.0 are one setting
        return node

    text = json.dumps(canonical(without_excluded(config), DEFAULTS), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def training_hash(config: Mapping[str, Any]) -> str:
    """config_hash of what the weights depend on: runs that differ in their measurement alone share one training."""
    kept = {key: value for key, value in config.items() if key not in MEASUREMENT}
    for section, names in MEASURED_WITH.items():
        kept[section] = {key: value for key, value in config[section].items() if key not in names}
    return config_hash(kept)


def _defaults(name: str) -> dict[str, Any]:
    """The default of each parameter that has one, of what a name stands for."""
    parameters, _ = parameters_of(name)
    return {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _with_defaults(node: Any) -> Any:
    """A configuration that says what it leaves to the defaults of its parts."""
    if isinstance(node, list):
        return [_with_defaults(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    known = _defaults(node["_target_"]) if "_target_" in node else {}
    plain = {
        k: list(v) if isinstance(v, tuple) else v for k, v in known.items() if k not in EXCLUDED_ANYWHERE
    }
    return {**plain, **{key: _with_defaults(value) for key, value in node.items()}}


def asked(overrides: list[str]) -> list[str]:
    """The overrides that a record keeps: those that change what is computed, a place on this machine as PATH."""
    kept = []
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if key.split(".")[0].split("@")[0] in EXCLUDED:
            continue
        if key.split(".")[-1] not in (*EXCLUDED_ANYWHERE, *PLACES) or {*key.split(".")} & {*FREE}:
            kept.append(override)
        elif value not in ("null", "true", "false"):  # data.download=false is no place
            kept.append(f"{key}=PATH")
    return kept


def differences(usual: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Every setting that changes the result and differs: its dotted name -> [usual value, this configuration's].

    The same data known on one side alone, where they do not lie at their usual place, are no difference.
    """

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        return {
            k: v for key, child in node.items() for k, v in flat(child, f"{prefix}.{key}".lstrip(".")).items()
        }

    one, other = (flat(_with_defaults(without_excluded(c))) for c in (usual, config))
    found = {
        key: [one.get(key), other.get(key)]
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    }

    def of_other_data(key: str) -> bool:
        return any(f"{key[:end]}_target_" in found for end, mark in enumerate(key, 1) if mark == ".")

    return {
        key: values
        for key, values in found.items()
        if key.rpartition(".")[2] not in CONTENTS or None not in values or of_other_data(key)
    }
