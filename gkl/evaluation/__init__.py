"""Accuracy on clean and attacked images: per-image flags, so that shards and batches can be put together.

correct = accuracy(model, images, labels, batch_size=256, device=device)          # (N,) bool
robust = pgd_robust(model, images, labels, epsilon=8 / 255, steps=20, ...)        # (N,) bool
result = evaluate(model, images, labels, epsilon=8 / 255, folder=folder, ...)     # AutoAttack
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.attacks.pgd import Norm, check_radius, pgd, random_start
from gkl.evaluation.autoattack import AutoAttackResult, evaluate
from gkl.evaluation.inputs import check_classes, checked
from gkl.evaluation.recorded import recordings
from gkl.rng import sample_keys

__all__ = ["AutoAttackResult", "accuracy", "evaluate", "pgd_robust"]

LogitsFn = Callable[[Tensor], Tensor]


@torch.no_grad()
def accuracy(
    logits_fn: LogitsFn, images: Tensor, labels: Tensor, *, batch_size: int, device: torch.device
) -> Tensor:
    """Which images are classified correctly, (N,) bool on the CPU. images: (N, 3, H, W), uint8 or float in [0, 1].

    Raises ValueError for others, for labels that are no classes of theirs, and for a module in training mode.
    """
    labels = checked(logits_fn, images, labels)
    correct: list[Tensor] = []
    for x, y, _ in _batches(images, labels, batch_size, device):
        logits = logits_fn(x)
        if not correct:
            check_classes(labels, logits)
        correct.append((logits.argmax(-1) == y).cpu())
    return torch.cat(correct) if correct else torch.zeros(0, dtype=torch.bool)


def pgd_robust(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float = 2 / 255,
    norm: Norm = "linf",
    loss: Literal["ce", "cw"] = "ce",
    seed: int = 0,
    numbers: Tensor | None = None,
    batch_size: int,
    device: torch.device,
    graph: bool = True,
) -> Tensor:
    """Which images withstand PGD-`steps` from one random start in the epsilon-ball, (N,) bool on the CPU.

    images: (N, 3, H, W), uint8 or float in [0, 1]. Raises as `accuracy`, and for a radius that is none of theirs.
    loss: "ce" climbs the cross-entropy (PGD), "cw" the margin max_{k != y} z_k - z_y (CW). epsilon, step_size: pixel
    units. The start depends on (seed, image number) alone; numbers: the images' where they are part of a set, else
    0..N-1. logits_fn: in eval mode. graph: on a GPU, replay a step from a recording, with the same bits. Source: Table XV.
    """
    labels = checked(logits_fn, images, labels)
    check_radius(norm, epsilon, images[0].numel() if len(images) else None)
    if len(images):
        with torch.no_grad():
            check_classes(labels, logits_fn(next(_batches(images[:1], labels[:1], 1, device))[0]))
    objective = _cross_entropy if loss == "ce" else _margin

    def climbed(x: Tensor, y: Tensor, x_adv: Tensor, steps: int = 1) -> Tensor:
        return pgd(
            logits_fn, x, partial(objective, labels=y), norm=norm, epsilon=epsilon, step_size=step_size, steps=steps,
            start=x_adv, validate=False,
        )  # fmt: skip

    robust = []
    with recordings(device, graph) as replayed:
        for x, y, index in _batches(images, labels, batch_size, device):
            number = index if numbers is None else numbers.to(device)[index]
            keys = sample_keys(seed, 0, number, "pgd_start")
            x_adv = random_start(x, keys, norm=norm, epsilon=epsilon)
            if replayed is None:
                x_adv = climbed(x, y, x_adv, steps)
            else:
                for _ in range(steps):
                    x_adv = replayed("pgd", climbed, (x, y, x_adv))
            with torch.no_grad():
                robust.append((logits_fn(x_adv).argmax(-1) == y).cpu())
    return torch.cat(robust) if robust else torch.zeros(0, dtype=torch.bool)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return others.amax(-1) - true


def _batches(
    images: Tensor, labels: Tensor, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Float images in [0, 1], labels and image numbers, batch by batch on the device."""
    for index in torch.arange(len(labels)).split(batch_size) if len(labels) else ():
        x = images[index].to(device)
        yield (x.float() / 255 if x.dtype == torch.uint8 else x), labels[index].to(device), index.to(device)
