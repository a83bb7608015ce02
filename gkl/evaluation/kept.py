"""Finished batches of an evaluation, kept in a folder that its processes share and a later start reads.

    kept = Kept(folder, {"network": fingerprint(model), "data": digest(images, labels), "epsilon": 0.03, ...})
    kept.write("apgd-ce", 3, points, {"robust": flags})
    kept.read("apgd-ce", 3, points)          # what it says, None where it is missing or damaged

What is kept is keyed by everything it depends on, contents and never names; batches of other networks or settings lie beside.
"""

import hashlib
import inspect
import json
import time
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import CellType, CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gkl.atomic import atomically

OF_TORCH = {*vars(nn.Module()), "_is_full_backward_hook"}  # told otherwise, or nothing of what is computed
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
PATIENCE_HOURS = 24.0  # for another process's batch: the longest attack on a large network takes some


class Kept:
    """Batches of one network, data and settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """settings: all that a batch's outcome depends on beside its images' numbers, as JSON holds it."""
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, attack: str, number: int, points: Tensor) -> dict[str, Any] | None:
        """What a finished batch of these images says; None when it is missing or damaged, so that it is attacked again."""
        try:
            with np.load(self._path(attack, number), allow_pickle=False) as file:
                part = {name: file[name] for name in ("points", "robust", "seconds", "warnings")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return part if np.array_equal(part["points"], points.numpy()) else None

    def awaited(self, attack: str, number: int, points: Tensor) -> dict[str, Any]:
        """A finished batch, as soon as the process that attacks it has written it. Raises TimeoutError after PATIENCE_HOURS."""
        deadline = time.monotonic() + 3600 * PATIENCE_HOURS
        while (part := self.read(attack, number, points)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no process has finished {attack}, batch {number}, within {PATIENCE_HOURS:g} hours: there is no "
                    f"{self._path(attack, number)}; is each of them at work, and does each see this folder?"
                )
            time.sleep(0.2)
        return part

    def write(
        self, attack: str, number: int, points: Tensor, outcome: Mapping[str, Any], seconds: float
    ) -> None:
        """Keep a batch, whole or not at all."""
        path = self._path(attack, number)
        with atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, points=points.numpy(), seconds=np.array(seconds), **outcome)

    def _path(self, attack: str, number: int) -> Path:
        return self.folder / f"{attack}_{number:05d}.npz"


def digest(*tensors: Tensor) -> str:
    """sha256 of tensors' shapes, types and contents."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """sha256 of what a network in eval mode computes: its modules' classes and code, their settings, all parameters and buffers.

    Two networks of one state dict have two fingerprints where they differ in an activation, a normalisation, a method, a hook, a
    plain number or a tensor beside the state dict.
    """
    said = [repr(model)]
    for name, module in model.named_modules():
        said += [name, type(module).__module__, type(module).__qualname__, *_methods(type(module))]
        said += [_code(hook) for hooks in HOOKS for hook in getattr(module, hooks).values()]
        if not isinstance(module, _BatchNorm):  # of which repr says all that counts in eval mode
            said += [f"{k}={_said(v)}" for k, v in sorted(vars(module).items()) if k not in OF_TORCH]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    said += [name for name, _ in tensors]
    return hashlib.sha256("\n".join([*said, digest(*(t for _, t in tensors))]).encode()).hexdigest()


def _methods(kind: type) -> list[str]:
    """The code of a class and of those that it is made from, up to torch's own."""
    made = [c for c in kind.__mro__ if c is not object and not _of_torch(c)]
    return [
        f"{name}={_code(getattr(f, 'fget', f))}"
        for c in made
        for name, f in sorted(vars(c).items())
        if _runs(f)
    ]


def _runs(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, partial | property)


def _said(value: Any) -> str:
    """What an attribute holds, as far as it can be told: numbers, names, tensors, arrays, functions, containers of those."""
    if isinstance(value, Mapping):
        return repr([(repr(k), _said(v)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return repr([_said(item) for item in value])
    if isinstance(value, Tensor):
        return "" if value.is_meta else digest(value)
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype}{value.shape}{value.tobytes() if value.dtype != object else ''!r}"
    if value is None or isinstance(
        value, bool | int | float | complex | str | bytes | torch.dtype | torch.Size
    ):
        return repr(value)
    return _code(value) if _runs(value) else type(value).__qualname__


def _code(function: Any, seen: frozenset[int] = frozenset()) -> str:
    """What a function does, as far as Python says: its instructions and constants, what it holds, and what it names in its file."""
    if isinstance(function, partial):
        said = _said(function.args), _said(sorted(function.keywords.items()))
        return repr((_code(function.func, seen), *said))
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen:
        return str(getattr(function, "__qualname__", type(function).__qualname__))
    named = function.__globals__
    beside = {name: named[name] for name in _names(code) if name in named} | {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
        if not _is_empty(cell)
    }
    seen = seen | {id(code)}
    held = [
        (name, _code(v, seen) if _runs(v) else _said(v))
        for name, v in sorted(beside.items())
        if not (_runs(v) and _of_torch(v))
    ]
    return repr((_instructions(code), _said(function.__defaults__), _said(function.__kwdefaults__), held))


def _instructions(code: CodeType) -> tuple[Any, ...]:
    constants = [_instructions(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return code.co_code, code.co_names, constants


def _constant(value: Any) -> str:
    """The elements of a frozenset have another order in each process."""
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _names(code: CodeType) -> list[str]:
    """Names in a function and in those that it defines."""
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return sorted({*code.co_names, *inner})


def _is_empty(cell: CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _of_torch(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in ("torch", "builtins", "math")
