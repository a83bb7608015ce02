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
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gkl.atomic import atomically

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

    Two networks of one state dict have two fingerprints where they differ in an activation, a normalisation or a plain number.
    """
    said = [repr(model)]
    for name, module in model.named_modules():
        said += [name, type(module).__qualname__, _code(type(module).forward)]
        if not isinstance(module, _BatchNorm):  # of which repr says all that counts in eval mode
            said += [
                f"{k}={v if _is_plain(v) else _code(v)}"
                for k, v in sorted(vars(module).items())
                if _counts(k, v)
            ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    said += [name for name, _ in tensors]
    return hashlib.sha256("\n".join([*said, digest(*(t for _, t in tensors))]).encode()).hexdigest()


def _counts(name: str, value: Any) -> bool:
    """Whether a module's attribute may change what it computes, as far as it can be told."""
    return (
        name != "training"
        and not name.startswith("_")
        and (_is_plain(value) or inspect.isroutine(value) or isinstance(value, partial))
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _code(function: Any) -> str:
    """What a function does, as far as Python says: its instructions, the names and constants in it, what it holds."""
    if isinstance(function, partial):
        return repr((_code(function.func), function.args, sorted(function.keywords.items())))
    code = getattr(function, "__code__", None)
    if code is None:
        return getattr(function, "__qualname__", repr(type(function)))
    constants = [c for c in code.co_consts if _is_plain(c)]
    held = [cell.cell_contents for cell in function.__closure__ or () if _is_plain(cell.cell_contents)]
    return repr((code.co_code, code.co_names, constants, function.__defaults__, held))
