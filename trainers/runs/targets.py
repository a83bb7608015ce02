"""What a configuration may build, by name: `attack/PGD` is what a file of configs/attack names as its `_target_`.

    locate("attack/PGD")                 # the class
    instantiate({"_target_": "attack/PGD", "epsilon": 0.03, ...})

The files of configs/ alone say where a name's class or function lies. Composed configurations, identities, records and frozen
configurations hold names: a class moves without changing any of them, and none of them can have other code run.
"""

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from trainers.errors import ConfigError

GIVEN = ("num_classes",)  # what is known when a part is made
WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
    type(None): ("null", "null"),
}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@cache
def addresses() -> dict[str, str]:
    """Name -> dotted address, of every `_target_` in configs/. Raises ConfigError where one name has two."""
    found: dict[str, str] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        kind = path.relative_to(CONFIGS).parts[0]
        for address in re.findall(r"_target_: *([\w.]+)", path.read_text(encoding="utf-8")):
            name = f"{kind}/{address.rpartition('.')[2]}"
            if found.setdefault(name, address) != address:
                raise ConfigError(
                    f"configs/ gives {name} two addresses, {found[name]} and {address}; it needs one"
                )
    return found


@cache
def _names() -> dict[str, str]:
    return {address: name for name, address in addresses().items()}


def named(node: Any) -> Any:
    """A configuration with names for addresses. Raises ConfigError for an address that no file of configs/ has."""
    if isinstance(node, list):
        return [named(child) for child in node]
    if not isinstance(node, dict):
        return node
    made = {key: named(child) for key, child in node.items()}
    if "_target_" in made:
        address = made["_target_"]
        if address in addresses():
            return made
        if address not in _names():
            raise ConfigError(
                f"_target_ names {address!r}; a configuration builds only what a file of configs/ names, each in the folder of its kind"
            )
        made["_target_"] = _names()[address]
    return made


def locate(name: str) -> Callable[..., Any]:
    """The class or function of a name. Raises ConfigError for an unknown one."""
    if name not in addresses():
        raise ConfigError(
            f"{name!r} is nothing that a configuration may build; configs/ has no such _target_"
        )
    module, _, attribute = addresses()[name].rpartition(".")
    try:
        return typing.cast(Callable[..., Any], getattr(importlib.import_module(module), attribute))
    except AttributeError:
        raise ConfigError(
            f"configs/ says that {name} is {module}.{attribute}, which does not exist"
        ) from None


def instantiate(node: Any, **given: Any) -> Any:
    """The object that a checked node describes; plain values are themselves. Raises ConfigError for bad values.

    given: further arguments; a node with `_partial_` and none is made into a function that takes the rest.
    """
    if isinstance(node, list):
        return [instantiate(child) for child in node]
    if not isinstance(node, dict):
        return node
    values = {key: instantiate(child) for key, child in node.items() if key not in ("_target_", "_partial_")}
    if "_target_" not in node:
        return values
    call = partial(locate(node["_target_"]), **{**values, **given})
    if node.get("_partial_") and not given:
        return call
    try:
        return call()
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


@cache
def parameters_of(name: str) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters by name, and their types, of what a name stands for."""
    target = locate(name)
    found = inspect.signature(target).parameters
    parameters = {n: p for n, p in found.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    hinted = target.__init__ if inspect.isclass(target) else target
    return parameters, typing.get_type_hints(hinted)


def check_values(config: Mapping[str, Any]) -> None:
    """Every named part takes the keys it is given, and of the types they have. Raises ConfigError."""
    for name, node in config.items():
        _check(node, name)


def _check(node: Any, where: str) -> None:
    if isinstance(node, list):
        for number, child in enumerate(node):
            _check(child, f"{where}[{number}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        parameters, hints = parameters_of(node["_target_"])
        for key, value in node.items():
            if key in ("_target_", "_partial_"):
                continue
            if key not in parameters:
                raise ConfigError(
                    f"{node['_target_']} takes no {where}.{key}{closest(key, list(parameters))}"
                )
            if not (isinstance(value, dict) and "_target_" in value) and not fits(value, hints.get(key, Any)):
                raise ConfigError(mistyped(f"{where}.{key}", hints[key], value))
        needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in GIVEN]
        if (
            not node.get("_partial_")
            and where != "method"
            and (missing := [n for n in needed if n not in node])
        ):
            raise ConfigError(
                f"{where} needs {', '.join(f'{where}.{n}' for n in missing)}, which {node['_target_']} cannot do without"
            )
    for key, child in node.items():
        _check(child, f"{where}.{key}")


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value is of an annotated type; what is no plain type takes anything."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is inspect.Parameter.empty:
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
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
        there = isinstance(value, list) and (bool(value) or origin is list)  # a Sequence is of one at least
        return there and all(fits(item, arguments[0]) for item in value if arguments)
    return True  # objects are built by their own `_target_`


def mistyped(name: str, annotation: Any, value: Any) -> str:
    """One line for a value of another type, in the words of a YAML file."""
    *others, last = _in_words(annotation)
    wanted = f"{', '.join(others)} or {last}" if others else last
    levels = re.fullmatch(r"([\d.]+)/255", value) if isinstance(value, str) else None
    hint = f"; a fraction is written '${{px:{levels[1]}}}', in quotes" if levels else ""
    return f"{name} must be {wanted}, got {as_typed(value)}{hint}"


def _in_words(annotation: Any, some: bool = False) -> list[str]:
    """What a setting of a type may be, in words; some: several of them."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return [as_typed(argument).strip("'") for argument in arguments]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [word for argument in arguments for word in _in_words(argument, some)]
    if typing.get_origin(annotation) in (Sequence, list, tuple):
        return [f"{'lists' if some else 'a list'} of {' or '.join(_in_words(arguments[0], some=True))}"]
    if annotation is bool:
        return ["true", "false"]
    one, several = WORDS.get(annotation, ("a part that configs/ names", "parts that configs/ names"))
    return [several if some else one]


def as_typed(value: Any) -> str:
    """A plain value as a person types it, text in quotes."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(as_typed, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """One line for a name that does not exist."""
    return f"unknown {kind} {name!r}{closest(name, known)}; there are: {', '.join(known)}"


def closest(name: str, known: Sequence[str]) -> str:
    """A question after the nearest of the known names, "" if none is near."""
    close = difflib.get_close_matches(name, [other for other in known if other != name], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
