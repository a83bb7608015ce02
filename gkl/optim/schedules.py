"""Learning rates as a function of the epoch, to the digit of the published code.

A schedule is a function (epoch 1..epochs, epochs) -> factor of the base learning rate, or of another setting; with
schedule_every=step one of (step 0..steps-1, steps), counted over the whole training.
"""

import math
from collections.abc import Sequence


def cosine(epoch: int, epochs: int, *, offset: int = 0, length: int = 0) -> float:
    """0.5 (1 + cos(pi (epoch - offset) / (epochs + length))).

    GKL's runs: offset 0, length 1 (epoch / 201). The KL baseline's: offset 1, length 0 ((epoch - 1) / 200).
    Source: the learning-rate functions of the authors' two training scripts.
    """
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - offset) / (epochs + length)))


def multi_step(
    epoch: int, epochs: int, *, drops: Sequence[int], of: int, factor: float = 0.1, first: float = 1.0
) -> float:
    """`factor` more from each epoch of `drops` on, counted in a training of `of` epochs; `first` in epoch 1.

    TRADES-AWP: drops (100, 150) of 200. Rice et al., AT-AWP: (101, 151) of 200. LBGAT: (76, 91) of 100, first 0.2.
    """
    if epoch == 1 and first != 1.0:
        return first
    return factor ** sum(epoch - 1 >= (drop - 1) * epochs / of for drop in drops)


def warmup_cosine(epoch: int, epochs: int, *, warmup: int) -> float:
    """epoch / warmup until `warmup`, then 0.5 (1 + cos(pi (epoch - warmup) / (epochs - warmup + 1))).

    ImageNet-LT's: 10 of 90 epochs. Source: adjust_learning_rate of the authors' script, whose epochs count from 0.
    """
    if epoch <= warmup:
        return epoch / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup + 1)))


def timm_cosine(epoch: int, epochs: int, *, warmup: int, start: float, end: float) -> float:
    """From `start` linearly to 1 over `warmup` epochs, then the cosine from 1 in epoch 1 to `end`, which is cut into there.

    Source: timm's CosineLRScheduler as its training script makes it, whose epochs count from 0.
    """
    if epoch <= warmup:
        return start + (1.0 - start) * (epoch - 1) / warmup
    return _cosine(1.0, end, (epoch - 1) / epochs)


def one_cycle(
    epoch: int, epochs: int, *, start: float, peak: float, end: float, rise: float = 0.025
) -> float:
    """Cosine from `start` to `peak` over the first `rise` of the epochs, then from `peak` to `end`.

    DM-AT steps torch's OneCycleLR once an epoch: learning rate 1/25, 1, 4e-6 of its largest; and, its default, momentum
    0.95, 0.85, 0.95. Source: Smith & Topin 2018; torch.optim.lr_scheduler.OneCycleLR.
    """
    turn, last = rise * epochs - 1, epochs - 1  # steps, from 0, at which the peak and the end are reached
    step = epoch - 1
    if step <= turn:
        return _cosine(start, peak, step / turn if turn > 0 else 1.0)
    return _cosine(peak, end, (step - turn) / (last - turn) if last > turn else 1.0)


def usb_cosine(step: int, steps: int, *, warmup: int) -> float:
    """step / warmup until `warmup`, then cos(7/16 pi (step - warmup) / (steps - warmup)): by step, from 0. It ends at 0.195.

    Source: get_cosine_schedule_with_warmup of USB, as FixMatch has it.
    """
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, math.cos(math.pi * 7 / 16 * (step - warmup) / max(1, steps - warmup)))


def clip_cosine(step: int, steps: int, *, warmup: int) -> float:
    """(step + 1) / warmup until `warmup`, then 0.5 (1 + cos(pi (step - warmup) / (steps - warmup))): by step, from 0.

    Source: OpenCLIP's cosine_lr.
    """
    if step < warmup:
        return (step + 1) / warmup
    return _cosine(1.0, 0.0, (step - warmup) / (steps - warmup))


def warmup_share_cosine(step: int, steps: int, *, warmup: float) -> float:
    """step / w until w = ceil(warmup * steps), then 0.5 (1 + cos(pi (step - w) / (steps - w))): by step, from 0.

    Source: transformers' get_cosine_schedule_with_warmup and warmup_ratio, as LLaVA trains; the first step has rate 0.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return step / rising
    return _cosine(1.0, 0.0, (step - rising) / max(1, steps - rising))


def poly(step: int, steps: int, *, power: float) -> float:
    """(1 - step / steps)^power: by step, from 0. Source: poly_learning_rate of dvlab-research/APD, whose first step has the whole rate."""
    return (1.0 - step / steps) ** power


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * share))
