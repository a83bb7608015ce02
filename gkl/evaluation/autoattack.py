"""AutoAttack, the installed `pyautoattack`, made shardable, resumable and checked.

    result = evaluate(model, images, labels, epsilon=8 / 255, folder=Path("autoattack"), device=device)
    result.aa, result.clean                                       # percent

The images are cut into batches; each batch is one whole AutoAttack run with its own seed, written when it is finished.
Batches know nothing of each other, so any number of processes may share them and a killed evaluation goes on with the
next one. (The package's own state file cannot be resumed from, see README.) Source: Croce & Hein 2020.
"""

import hashlib
import json
import logging
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from gkl.attacks import Norm

Version = Literal["standard", "screen"]
# The screen is for development: APGD-CE and APGD-T alone. Its number is never called AutoAttack.
ATTACKS = {"standard": ("apgd-ce", "apgd-t", "fab-t", "square"), "screen": ("apgd-ce", "apgd-t")}
TOLERANCE = 1e-5  # of the independent check that adversarial images lie in the ball, in pixel units


@dataclass(frozen=True)
class AutoAttackResult:
    """Accuracies in percent and the flags they come from, in the order of the images given."""

    clean: float
    robust: float
    clean_flags: Tensor
    robust_flags: Tensor
    after: dict[str, float]  # robust accuracy after each attack, percent
    warnings: list[str]
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Images attacked."""
        return len(self.robust_flags)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    folder: Path,
    device: torch.device,
    norm: Norm = "linf",
    version: Version = "standard",
    batch_size: int = 200,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> AutoAttackResult | None:
    """Attack this process's batches (number % world_size == rank) and return the result once all are there, else None.

    model: in eval mode, images in [0, 1] to logits, at least 4 classes. images: (N, 3, H, W), uint8 or float.
    folder: where finished batches are kept; those of other weights or settings lie beside them and are not read.
    on_progress: called with (batches finished, batches) of this process. epsilon: pixel units.
    Raises ValueError for a model in training mode or with too few classes, RuntimeError if AutoAttack returns an image
    outside the ball or one it calls misclassified that is not.
    """
    if model.training:
        raise ValueError(
            "AutoAttack needs a model in eval mode, it is in training mode; call model.eval() first"
        )
    if version not in ATTACKS or norm not in ("linf", "l2"):
        raise ValueError(
            f"version must be {' or '.join(ATTACKS)} and norm linf or l2, got {version!r} and {norm!r}"
        )
    settings = {
        "epsilon": round(epsilon, 12), "norm": norm, "version": version, "seed": seed, "batch_size": batch_size,
        "weights": _digest(model.state_dict().values()), "data": _digest([images, labels]),
        "pyautoattack": package_version("pyautoattack"),
    }  # fmt: skip
    folder = folder / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    batches = list(torch.arange(len(labels)).split(batch_size))
    mine = range(rank, len(batches), world_size)
    with _reproducible(model, device):
        for done, number in enumerate(mine, 1):
            path = folder / f"batch_{number:05d}.npz"
            if _read(path) is None:
                x = images[batches[number]].to(device)
                x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
                y = labels[batches[number]].to(device)
                _write(
                    path, _attack(model, x.contiguous(), y, epsilon, norm, version, batch_size, seed, device)
                )
            if on_progress:
                on_progress(done, len(mine))
    return collect(folder, len(batches), settings) if _all_there(folder, len(batches)) else None


def collect(folder: Path, batches: int, settings: dict[str, Any]) -> AutoAttackResult:
    """Put the finished batches of a folder together. Raises FileNotFoundError naming the missing ones."""
    read = [_read(folder / f"batch_{number:05d}.npz") for number in range(batches)]
    parts = [part for part in read if part is not None]
    if len(parts) < batches:
        missing = [number for number, part in enumerate(read) if part is None]
        raise FileNotFoundError(
            f"{folder} lacks the batches {missing}; run the evaluation again to attack them"
        )
    clean = torch.from_numpy(np.concatenate([p["clean"] for p in parts]))
    robust = torch.from_numpy(np.concatenate([p["robust"] for p in parts]))
    after = np.sum([p["after"] for p in parts], axis=0)
    warnings = sorted({str(w) for p in parts for w in p["warnings"]})
    return AutoAttackResult(
        clean=100.0 * clean.double().mean().item(),
        robust=100.0 * robust.double().mean().item(),
        clean_flags=clean,
        robust_flags=robust,
        after={
            a: 100.0 * float(n) / len(clean) for a, n in zip(ATTACKS[settings["version"]], after, strict=True)
        },
        warnings=warnings,
        seconds=float(sum(p["seconds"] for p in parts)),
        versions={"pyautoattack": settings["pyautoattack"], "torch": torch.__version__},
    )


def _all_there(folder: Path, batches: int) -> bool:
    return all((folder / f"batch_{number:05d}.npz").exists() for number in range(batches))


def _read(path: Path) -> dict[str, Any] | None:
    """What a finished batch says; None when it is missing or damaged, so that it is attacked again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("clean", "robust", "after", "seconds", "warnings")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _attack(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, norm: Norm, version: Version, batch_size: int, seed: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """One batch: flags, robust counts after each attack, adversarial images, warnings, seconds."""
    wrapped = _Contiguous(model)
    with torch.no_grad():
        logits = wrapped(x)
    if logits.shape[1] < 4:
        raise ValueError(
            f"AutoAttack's targeted DLR loss needs at least 4 classes, the model has {logits.shape[1]}"
        )
    clean = logits.argmax(-1) == y
    attacks = list(ATTACKS[version])
    adversary = AutoAttack(
        wrapped, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=seed, version="custom", attacks=attacks,
        device=device,
    )  # fmt: skip
    # What the package's "standard" sets, with as many target classes as there are.
    adversary.apgd.n_restarts = adversary.fab.n_restarts = adversary.apgd_targeted.n_restarts = 1
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, logits.shape[1] - 1)
    adversary.square.n_queries = 5000
    started = time.monotonic()
    with _listening() as heard:
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
    counts = dict(re.findall(r"robust accuracy after (\S+): ([\d.]+)%", "\n".join(heard["lines"])))
    with torch.no_grad():
        robust = wrapped(x_adv).argmax(-1) == y
    _check(x, x_adv, clean, robust, epsilon, norm)
    left = int(clean.sum())
    after = []
    for attack in attacks:  # attacks that had no image left say nothing
        left = round(float(counts[attack.upper()]) / 100 * len(y)) if attack.upper() in counts else left
        after.append(left)
    if after[-1] != int(robust.sum()):
        raise RuntimeError(
            f"AutoAttack counts {after[-1]} robust images of {len(y)}, its own images give {int(robust.sum())}"
        )
    return {
        "clean": clean.cpu().numpy(),
        "robust": robust.cpu().numpy(),
        "after": np.array(after),
        "x_adv": x_adv.cpu().numpy(),
        "warnings": np.array(heard["warnings"], dtype=np.str_),
        "seconds": np.array(time.monotonic() - started),
    }


def _check(x: Tensor, x_adv: Tensor, clean: Tensor, robust: Tensor, epsilon: float, norm: Norm) -> None:
    """Look at AutoAttack's images without AutoAttack: in the ball, in [0, 1], and unchanged where it did not succeed."""
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    if not bool((size <= epsilon + TOLERANCE).all()):
        raise RuntimeError(
            f"AutoAttack returned an image {size.max().item():.6f} away, epsilon is {epsilon:.6f}"
        )
    if x_adv.isnan().any() or x_adv.min() < 0 or x_adv.max() > 1:
        raise RuntimeError("AutoAttack returned pixels outside [0, 1]")
    if bool((robust & ~clean).any()):
        raise RuntimeError("AutoAttack's image of a misclassified picture is classified correctly")


class _Contiguous(nn.Module):
    """The model, handing AutoAttack contiguous gradients: its zero-gradient check fails on channels_last ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.model(_ContiguousGradient.apply(x))


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


@contextmanager
def _listening() -> Iterator[dict[str, list[str]]]:
    """Collect what the package logs, its warnings apart, and print none of it; the tracer it removes is put back."""
    heard: dict[str, list[str]] = {"lines": [], "warnings": []}

    class Collect(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            heard["warnings" if entry.levelno >= logging.WARNING else "lines"].append(entry.getMessage())

    logger, handler, tracer = logging.getLogger("auto-attack"), Collect(), sys.gettrace()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        sys.settrace(tracer)


@contextmanager
def _reproducible(model: nn.Module, device: torch.device) -> Iterator[None]:
    """float32 without TF32, parameters frozen, and the caller's random state untouched."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def _write(path: Path, arrays: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    try:
        np.savez(temporary, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
