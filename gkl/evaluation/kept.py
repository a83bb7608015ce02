"""Finished batches of an evaluation, kept in a folder that its processes share and a later start reads.

    kept = Kept(folder, {"network": fingerprint(model), "data": digest(images, labels), "epsilon": 0.03, ...}, looks(logits))
    kept.write("apgd-ce", 3, points, {"robust": flags})
    kept.read("apgd-ce", 3, points)          # what it says, None where it is missing or damaged

What is kept is keyed by everything it depends on, contents and never names; batches of other networks or settings lie beside.
"""

import hashlib
import inspect
import itertools
import json
import sysconfig
import time
import zipfile
from collections.abc import Mapping
from functools import cache, partial
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
PACKAGES, STDLIB = sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")
SAME = 1e-3  # how far two looks at one network may lie apart
PATIENCE_HOURS = 24.0  # for another process's batch: the longest attack on a large network takes some


class Kept:
    """Batches of one network, data and settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seen: Tensor) -> None:
        """settings: all that a batch's outcome depends on beside its images' numbers, as JSON holds it. seen: see `named`."""
        self.folder = folder / named(folder, settings, seen)
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
    """sha256 of what is told of a network in eval mode: its modules' classes and code, their settings, all parameters and buffers.

    Two networks of one state dict have two fingerprints where they differ in an activation, a normalisation, a method, a hook, a
    plain number or a tensor beside the state dict; what an object of a class of its own holds is not told, see `named`. Of code in
    installed packages the file is told, and of torch nothing.
    """
    told = _Told()
    said = [repr(model)]
    for name, module in model.named_modules():
        said += [name, type(module).__module__, type(module).__qualname__, *told.methods(type(module))]
        said += [told.code(hook) for hooks in HOOKS for hook in getattr(module, hooks).values()]
        if not isinstance(module, _BatchNorm):  # of which repr says all that counts in eval mode
            said += [f"{k}={told.value(v)}" for k, v in sorted(vars(module).items()) if k not in OF_TORCH]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    said += [name for name, _ in tensors]
    return hashlib.sha256("\n".join([*said, digest(*(t for _, t in tensors))]).encode()).hexdigest()


def looks(*answers: Tensor) -> Tensor:
    """Numbers of the order of one, (N,) on the CPU, that say what a network answers: each of its answers in parts of the largest, and that."""
    parts = [answer.detach().double().cpu().flatten() for answer in answers]
    most = torch.stack([part.abs().max() for part in parts]).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.cat([*(part / m for part, m in zip(parts, most, strict=True)), most.log()])


def named(folder: Path, settings: Mapping[str, Any], seen: Tensor) -> str:
    """What things of these settings are called in a folder: their digest, with a number where others of the same digest looked otherwise.

    seen: what `looks` says of the network that the things come of; kept beside them. So they are never those of a network that answers otherwise,
    whatever settings can tell.
    """
    digits = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    mine = seen.numpy()
    for number in itertools.count():
        name = f"{digits}-{number}" if number else digits
        path = folder / f"{name}.looks.npy"
        if not path.exists():
            with atomically(path) as temporary, open(temporary, "wb") as file:
                np.save(file, mine, allow_pickle=False)
        try:
            theirs = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # damaged: what lies there is of nothing that is known
            continue
        if theirs.shape == mine.shape and np.abs(theirs - mine).max() <= SAME:
            return name
    raise AssertionError("unreachable")


class _Told:
    """What values and functions come to. A function is told once and then by its number, as tables and functions may name each other."""

    def __init__(self) -> None:
        self.functions: dict[Any, int] = {}
        self.within: list[int] = []  # the containers that are being told

    def methods(self, kind: type) -> list[str]:
        """The code of a class and of those that it is made from, up to torch's own."""
        made = [c for c in kind.__mro__ if c is not object and not _of_torch(c)]
        return [
            f"{name}={self.code(getattr(f, 'fget', f))}"
            for c in made
            for name, f in sorted(vars(c).items())
            if _runs(f)
        ]

    def value(self, value: Any) -> str:
        """What an attribute holds, as far as it can be told: numbers, names, tensors, arrays, functions, containers of those."""
        if isinstance(value, dict | list | tuple):
            if id(value) in self.within:
                return "around this"
            items = [(repr(k), v) for k, v in value.items()] if isinstance(value, dict) else value
            self.within.append(id(value))
            said = repr([self.value(item) for item in items])
            self.within.pop()
            return said
        if isinstance(value, Tensor):
            return "" if value.is_meta else digest(value)
        if isinstance(value, np.ndarray | np.generic):
            return f"{value.dtype}{value.shape}{value.tobytes() if value.dtype != object else ''!r}"
        plain = bool | int | float | complex | str | bytes | torch.dtype | torch.Size
        if value is None or isinstance(value, plain):
            return repr(value)
        return self.code(value) if _runs(value) else type(value).__qualname__

    def code(self, function: Any) -> str:
        """What a function does, as far as Python says: its instructions and constants, what it holds, and what it names in its file."""
        if isinstance(function, partial):
            said = self.value(function.args), self.value(sorted(function.keywords.items()))
            return repr((self.code(function.func), *said))
        function = getattr(function, "__func__", function)
        code, name = getattr(function, "__code__", None), getattr(function, "__qualname__", None)
        if code is None:
            return str(name or type(function).__qualname__)
        if Path(code.co_filename).is_relative_to(PACKAGES) or Path(code.co_filename).is_relative_to(STDLIB):
            return f"{name} of {_content(code.co_filename)}"
        if function in self.functions:
            return f"function {self.functions[function]}"
        self.functions[function] = len(self.functions)
        globals_ = function.__globals__
        beside = {name: globals_[name] for name in _names(code) if name in globals_} | {
            name: cell.cell_contents
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
            if not _is_empty(cell)
        }
        held = [(n, self.value(v)) for n, v in sorted(beside.items()) if not (_runs(v) and _of_torch(v))]
        defaults = self.value(function.__defaults__), self.value(function.__kwdefaults__)
        return repr((_instructions(code), *defaults, held))


@cache
def _content(file: str) -> str:
    """Digest of a source file; its name where it is none, as of code that was made."""
    path = Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else file


def _runs(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, partial | property)


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
