"""From what a person types to one resolved configuration; composed once, before anything expensive.

    config = compose("train", ["experiment=at/c100_basic_gkl", "scale=smoke", "seed=1"])

Hydra composes; what a person can get wrong ends in a ConfigError of one line.
One file, since what each word means depends on what the others have chosen.
"""

import copy
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gkl import own
from gkl.data.caption_sets import test_folders
from gkl.data.content import content, listing
from gkl.data.generated import prepared
from gkl.data.pairs import shards_content
from trainers.errors import ConfigError
from trainers.runs.composition import composition, parsed
from trainers.runs.settings import SETTINGS
from trainers.runs.targets import CONFIGS, closest, fits, mistyped, named, unknown


def register_resolvers() -> None:
    """The interpolations our YAML files use, but for at_scale, which each composition sets."""

    def by_protocol(choices: Mapping[str, Any], *, _root_: DictConfig) -> Any:
        return choices[_root_.protocol]

    def scaled(epoch: int, of: int = 200, *, _root_: DictConfig) -> int:
        return max(1, round(epoch * _root_.epochs / of))

    def px(levels: float) -> float:
        if not isinstance(levels, int | float):
            raise ValueError(f"px takes levels of 255, as ${{px:8}}, got {levels!r}")
        return levels / 255

    def by_model(choices: Mapping[str, Any], *, _root_: DictConfig) -> Any:
        return choices.get(_root_.model.name, choices["else"])

    def per_class(weight: float, *, _root_: DictConfig) -> float:
        return weight * (_root_.class_share or 1.0)

    def content_at(root: str | None) -> str | None:
        return root and content(root, Path(os.environ.get("GKL_OUTPUTS", "outputs")) / "digests")

    def tests(*, _parent_: DictConfig) -> str | None:
        folders = test_folders({str(key): _parent_[key] for key in _parent_ if key != "content"})
        return _listing(*folders.values()) if folders else None

    def sha256(path: str | None) -> str | None:
        there = path is not None and Path(path).is_file()  # what is missing is told where it is wanted
        return hashlib.sha256(Path(str(path)).read_bytes()).hexdigest() if there else None

    resolvers: dict[str, Callable[..., Any]] = {
        "content": content_at,
        "listing": _listing,
        "tests": tests,
        "sha256": sha256,
        "shards": shards_content,
        "sum": lambda *n: sum(n),
    }
    for name, found in resolvers.items():
        OmegaConf.register_new_resolver(name, found, replace=True)
    OmegaConf.register_new_resolver(
        "prepared", lambda source, root: prepared(root) if source == "edm" else None, replace=True
    )
    OmegaConf.register_new_resolver("by_protocol", by_protocol, replace=True)
    for resolver in (px, scaled, by_model, per_class):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


_listing = cache(listing)  # once for all rows of a table; each run looks again


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
    group = completed_by(stem)
    if group == "model":
        words = network("model", name)
        return [
            f"experiment={stem}",
            *(word for word in words if word != "model=plain"),
        ]  # plain: as the experiment makes its own
    if group:
        if name not in choices(group):
            raise ConfigError(unknown("pair", name, choices(group)))
        root, _, folder = group.partition("/")
        return [f"experiment={stem}", f"{root}={folder}/{name}"]
    return [f"experiment={experiment}"]


@cache
def completed_by(experiment: str) -> str | None:
    """The group whose choices complete an experiment's name, None for one that is whole or does not exist."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
    return content.get("completed_by") if isinstance(content, dict) else None


@cache
def families() -> dict[str, list[str]]:
    """File of configs/model -> the networks it makes by their names; `plain` makes any other, `own` those of a person's file."""
    found = OmegaConf.to_container(OmegaConf.load(CONFIGS / "networks.yaml"))
    assert isinstance(found, dict)
    return {**{str(family): list(names) for family, names in found.items()}, "plain": [], "own": []}


def network(key: str, name: str) -> list[str]:
    """What Hydra understands of model=resnet_20, a network by its own name. key: model, or model@teacher.network.

    Also of timm/resnet18, and of a person's own: net.py:Net, a name of an installed package, or a whole name of gkl.models.own.
    """
    name = name.removeprefix("timm/")
    if file := own_file(name):
        name = own.named(*file)
    if "@" in name:
        return [f"{key}=own", f'{key.rpartition("@")[2]}.name="{name}"']
    if name in choices("model"):
        made = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml"))
        assert isinstance(made, dict)
        # An experiment that names its network would have its own, made as this one is.
        its = [] if made.get("name", "???") == "???" else [f'{key.rpartition("@")[2]}.name="{made["name"]}"']
        return [f"{key}={name}", *its]
    family = next((family for family, names in families().items() if name in names), "plain")
    if family == "plain" and re.fullmatch(r"[\w.-]+", name):
        import timm

        import gkl.models  # makes its networks known to timm

        if not timm.is_model(name):
            if whole := own.installed(name):
                return network(key, whole)
            ours = [
                n
                for n in timm.list_models()
                if timm.model_entrypoint(n).__module__.startswith(gkl.models.__name__)
            ]
            known = sorted({*choices("model"), *ours} - {*families()})
            raise ConfigError(f"{unknown('model', name, known)}, and every name that timm knows")
    return [f"{key}={family}", f"{key.rpartition('@')[2]}.name={name}"]


def own_file(name: str) -> tuple[str, str] | None:
    """File and name in it of net.py:Net, None for other names. Raises ConfigError for a file alone."""
    file, _, inside = name.strip("'\"").rpartition(":")
    if inside.endswith(".py"):
        raise ConfigError(f"{name} is a file; say what in it makes the network: {name}:NAME")
    return (file, inside) if file.endswith(".py") else None


def _own_networks(overrides: Sequence[str], outputs: str | None) -> list[str]:
    """Overrides with whole names for the files of networks, each of which is kept."""
    words = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.partition("@")[0] == "model" and (file := own_file(value)):
            own.keep(file[0], Path(outputs or "outputs") / "networks")
            override = f"{key}={own.named(*file)}"
        words.append(override)
    return words


def _set(entry: str, overrides: Sequence[str]) -> list[str]:
    """Overrides with those of a configs/setting file in the place of its name; what is given beside it takes the place of its own.

    What it says of a section that an experiment does not have, as a network trained alone has no teacher, is not said there.
    """
    names = [override.partition("=")[2] for override in overrides if override.startswith("setting=")]
    if not names:
        return list(overrides)
    if len(names) > 1 or names[0] not in choices("setting"):
        raise ConfigError(unknown("setting", ",".join(names), choices("setting")))
    given = {override.partition("=")[0] for override in overrides}
    found: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "setting" / f"{names[0]}.yaml"))
    bare = compose(
        entry, [o for o in overrides if o.partition("=")[0] in ("experiment", "scale", "protocol")]
    )

    def said(override: str) -> bool:
        key = override.partition("=")[0]
        section, _, inner = key.partition(".")
        return key not in given and (not inner or bare.get(section) is not None)

    own = [override for override in found if said(override)]
    return [word for o in overrides for word in (own if o.startswith("setting=") else [o])]


def _words(override: str) -> list[str]:
    """An override as Hydra understands it."""
    key, _, value = override.partition("=")
    if key == "experiment":
        return completed(value)
    return network(key, value) if key.partition("@")[0] == "model" and value else [override]


def compose(entry: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of configs/<entry>.yaml with overrides applied, as plain dicts and lists.

    setting=NAME among them stands for those of configs/setting/NAME.yaml.

    Adds `experiment`, its whole name, and `scale`. Raises ConfigError.
    """
    folders = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("GKL_")))
    overrides = [
        re.sub(r"^([\w.@]+\.)?checkpoint\.key=", r"\1checkpoint_key=", o) for o in _set(entry, overrides)
    ]
    try:
        words = tuple(word for o in overrides for word in _words(o))
    except ValueError as error:  # of a person's own network
        raise ConfigError(str(error)) from error
    config = copy.deepcopy(_composed(entry, words, folders))
    given = [o for o in overrides if o.partition("=")[0] not in ("experiment", "scale", "protocol", "seed")]
    return {**config, "overrides": _own_networks(given, (config.get("paths") or {}).get("outputs"))}


@cache
def _composed(entry: str, overrides: tuple[str, ...], folders: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """compose, once for the same words and folders: a table asks for its rows' configurations again and again."""
    register_resolvers()
    try:
        _check_grammar(overrides)
        config, chosen = composition(CONFIGS, entry, overrides)
        completion = _completion(config, chosen)
        scale = chosen.get("scale", "paper")
        OmegaConf.register_new_resolver("at_scale", lambda choices: choices[scale], replace=True)
        for name, annotation in SETTINGS.items():
            plain = (
                name in config
                and not OmegaConf.is_missing(config, name)
                and not OmegaConf.is_interpolation(config, name)
            )
            if plain and not fits(config[name], annotation):
                raise ConfigError(mistyped(name, annotation, config[name]))
        _check_places(config, chosen)
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (
        HydraException,
        OmegaConfBaseException,
        ValueError,
    ) as error:  # ValueError: a group set to a number
        raise ConfigError(_explain(entry, str(error), overrides)) from None
    assert isinstance(resolved, dict)
    names = {key: chosen[key] for key in ("experiment", "scale") if key in chosen}
    if completion:
        names["experiment"] += f"/{completion}"
    for key in ("completed_by", "pair"):
        resolved.pop(key, None)
    return {**names, **named(resolved)}


def _check_places(config: DictConfig, chosen: Mapping[Any, Any]) -> None:
    """That no name was given to a place itself whose file is chosen by its group. Raises ConfigError."""
    for key in chosen:
        group, _, place = str(key).partition("@")
        value = OmegaConf.select(config, place) if place else None
        if isinstance(value, str):
            raise ConfigError(f"{place} is a section, got {value!r}; choose it as {group}@{place}={value}")


def _completion(config: DictConfig, chosen: Mapping[Any, Any]) -> str | None:
    """What completes the experiment's name, None where it is whole. Raises ConfigError where it is missing."""
    group = config.get("completed_by")
    if group == "model":
        if OmegaConf.is_missing(config.model, "name"):
            known = [name for names in families().values() for name in names]
            raise ConfigError(f"model=... is missing; one of: {', '.join(known)}, or another")
        return str(config.model.name if chosen["model"] in families() else chosen["model"])
    if group:
        root, _, folder = group.partition("/")
        if not str(chosen.get(root)).startswith(f"{folder}/"):
            raise ConfigError(f"{root}={folder}/... is missing; one of: {', '.join(choices(group))}")
        return str(chosen[root]).rpartition("/")[2]
    return None


def _check_grammar(overrides: Sequence[str]) -> None:
    for override in parsed(overrides):
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line!r} names several values; one run takes one value each, and one with a comma in it is quoted: "
                f"'{override.key_or_group}=\"...\"'"
            )


def _explain(entry: str, message: str, overrides: Sequence[str]) -> str:
    """Hydra's many-lined errors as one line with a remedy."""
    if match := re.search(r"Could not find '([\w/@.-]+)'|Could not load '([\w/@.-]+)'", message):
        wanted = next(name for name in match.groups() if name)
        group, _, name = wanted.partition("/")
        return unknown(group, name, choices(group))
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", message):
        key = next(name for name in match.groups() if name)
        typed = next((o for o in overrides if re.split("[=@]", o)[0].lstrip("+~").endswith(key)), key)
        return f"there is no setting {key!r} (from {typed!r}){closest(key.split('.')[-1], _all_keys(entry))}"
    if match := re.search(
        r"Error raised while resolving interpolation: (.+?)\s+full_key: ([\w.]+)", message, re.DOTALL
    ):
        return f"{' '.join(match[1].split())} (found for {match[2]})"
    if "Config group override must be" in message:
        group = next((o.partition("=")[0] for o in overrides if re.fullmatch(r"[\w@]+=(null|[\d.]*)", o)), "")
        return f"{group}=... needs a choice; one of: {', '.join(choices(group.partition('@')[0]))}"
    if match := re.search(r"You must specify '([^']+)', e\.g", message):
        group = match[1]
        return f"{group}=... is missing; one of: {', '.join(choices(group))}"
    if match := re.search(r"Missing mandatory value: ([\w.]+)(?:\s+full_key: ([\w.]+))?", message):
        return f"{match[2] or match[1]}=... is missing: it is left open, give it on the command line"
    if match := re.search(r"Interpolation key '([\w.]+)' not found\s+full_key: ([\w.]+)", message):
        return f"{match[2]} follows {match[1]}, which is not there; set {match[2]}=..., or choose other parts"
    if match := re.search(r"Unsupported interpolation type (\w+)\s+full_key: ([\w.]+)", message):
        return f"{match[2]}: there is no ${{{match[1]}:...}}; a fraction of 255 is ${{px:8}}"
    return "cannot read the overrides: " + " ".join(message.split())


def _all_keys(entry: str) -> list[str]:
    keys: set[str] = set()
    for path in CONFIGS.rglob("*.yaml"):
        keys.update(re.findall(r"^\s*([A-Za-z]\w*):", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return sorted(keys)


def usual(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same experiment at the same scale and protocol without overrides."""
    return compose("train", [f"{key}={config[key]}" for key in ("experiment", "scale", "protocol")])


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same experiment as the paper ran it: scale=paper, no overrides."""
    return compose(
        "train", [f"experiment={config['experiment']}", f"protocol={config['protocol']}", "scale=paper"]
    )
