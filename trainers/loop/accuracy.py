"""Final numbers of a network: clean accuracy and AutoAttack, over all processes of a run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkl.attacks.pgd import doubtful
from gkl.data.augment import to_float
from gkl.data.files import ImageFiles
from gkl.data.memory import ImageData
from gkl.data.stores import PictureError
from gkl.distributed import all_reduce, rank, world_size
from gkl.evaluation import (
    AutoAttackResult,
    LogitsFn,
    evaluate,
    pgd_robust,
)
from gkl.evaluation.chosen import chosen
from gkl.models.batch_norm import eval_mode
from gkl.models.classifier import dtype_of
from trainers.errors import LostProcess, RunError
from trainers.loop.console import Console

DESCRIBED = {"aa": "AutoAttack standard", "screen": "screen (APGD-CE, APGD-T)"}


def eval_batch_size(device: torch.device) -> int:
    """Test pictures that a network looks at together; on a CPU few: theirs is twice the speed of hundreds, whose activations
    are memory new from the system each time."""
    return 500 if device.type == "cuda" else 50


def batches_of(data: ImageData | ImageFiles, *chosen: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The data's `test_batches`. Raises RunError for a picture that cannot be read."""
    try:
        yield from data.test_batches(*chosen)
    except PictureError as error:
        raise RunError(f"{error}. What was finished is kept; start the same command again") from error


def test_page(data: Any, number: int) -> tuple[Tensor, Tensor]:
    """A test picture of a gkl.data.dense.DenseData with its labels. Raises RunError for one that cannot be read."""
    try:
        image, labels = data.test.read(number)
    except PictureError as error:
        raise RunError(f"{error}. What was finished is kept; start the same command again") from error
    return image, labels


def correct_flags(
    model: nn.Module, data: ImageData | ImageFiles, device: torch.device, workers: int = 0
) -> Tensor:
    """Which test images are classified correctly, (N,) bool on the CPU of every process; each is looked at once, by one."""
    mine = torch.arange(len(data.test_labels)).tensor_split(world_size())[rank()]
    dtype = dtype_of(model)
    flags = torch.zeros(len(data.test_labels), device=device)
    correct = []
    with eval_mode(model), torch.no_grad():
        for x, y in batches_of(data, mine, eval_batch_size(device), workers):
            logits = model(to_float(x.to(device, non_blocking=True)).to(dtype))
            correct.append(logits.argmax(-1) == y.to(device, non_blocking=True))
    if correct:
        flags[mine.to(device)] = torch.cat(correct).to(flags.dtype)
    return all_reduce(flags).bool().cpu()


def clean_accuracy(
    model: nn.Module, data: ImageData | ImageFiles, device: torch.device, workers: int = 0
) -> float:
    """Accuracy on all test images, percent."""
    return 100.0 * correct_flags(model, data, device, workers).double().mean().item()


def pgd_accuracy(
    logits_fn: LogitsFn, images: Tensor, labels: Tensor, *, device: torch.device, **attack: Any
) -> float:
    """Accuracy under PGD, percent, each image on one process. attack: what gkl.evaluation.pgd_robust takes."""
    mine = torch.arange(len(labels)).tensor_split(world_size())[rank()]
    robust = pgd_robust(
        logits_fn,
        images[mine],
        labels[mine],
        numbers=mine,
        batch_size=eval_batch_size(device),
        device=device,
        **attack,
    )
    return 100.0 * all_reduce(robust.sum().double().to(device)).item() / len(labels)


@contextmanager
def told_as_lost() -> Iterator[None]:
    """Inside, waiting in vain for another process is a RunError."""
    try:
        yield
    except TimeoutError as error:
        raise LostProcess(str(error)) from error


@contextmanager
def told_as_unmeasured() -> Iterator[None]:
    """Inside, a network that an attack refuses is a RunError."""
    try:
        yield
    except ValueError as error:
        raise RunError(
            f"AutoAttack cannot measure these weights: {error}. Where a training came to them, lower its learning rate or loss weights"
        ) from error


def attack_name(settings: Mapping[str, Any]) -> str:
    """What the number of a configs/evaluation file is called in metrics: `aa`, AutoAttack, or `screen`, which is less."""
    return "aa" if settings["version"] == "standard" else "screen"


def autoattack(
    model: nn.Module, data: ImageData | ImageFiles, settings: Mapping[str, Any], **place: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details of the attack named by a configs/evaluation file.

    Metrics: `aa` (standard) or `screen`, percent. Details: images attacked, clean accuracy on them, what was left after
    each attack, AutoAttack's warnings, versions. place: the folder, device and console of autoattack_result.
    """
    result = autoattack_result(model, data, settings, **place)
    details = {
        "attack": DESCRIBED[attack_name(settings)],
        "n": result.n,
        "clean_on_attacked": result.clean,
        "after": result.after,
        "epsilon": settings["epsilon"],
        "norm": settings["norm"],
        "warnings": [*filter(None, [doubtful(settings["norm"], settings["epsilon"])]), *result.warnings],
        "versions": result.versions,
    }
    return {attack_name(settings): result.robust}, details


def chosen_images(data: ImageData | ImageFiles, numbers: Tensor) -> Tensor:
    """Test pictures (N, 3, S, S) uint8 by number; those in files are decoded here: 0.75 GB for 5,000 of 224 pixels."""
    return torch.cat([x for x, _ in data.test_batches(numbers, 500, min(8, os.cpu_count() or 1))])


def autoattack_result(
    model: nn.Module,
    data: ImageData | ImageFiles,
    settings: Mapping[str, Any],
    *,
    folder: Path,
    device: torch.device,
    console: Console,
) -> AutoAttackResult:
    """The attack named by a configs/evaluation file, on every process; finished batches are kept in folder and shared.

    Raises RunError for weights that no attack says anything of, which a training may have come to.
    """
    numbers = chosen(data, settings["images"])
    name = DESCRIBED[attack_name(settings)]
    with eval_mode(model), told_as_lost(), told_as_unmeasured():
        return evaluate(
            model,
            chosen_images(data, numbers),
            data.test_labels[numbers],
            folder=folder,
            device=device,
            rank=rank(),
            world_size=world_size(),
            on_progress=lambda where, left: console.phase(f"{name}: {where}", left),
            **{key: settings[key] for key in ("version", "norm", "epsilon", "batch_size", "seed")},
        )
