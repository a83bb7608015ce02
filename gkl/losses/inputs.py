"""What the losses and the class prior take: logits, labels, weights and settings, each checked in one line; maps as rows.

Logits are (B, C), or (B, C, *) with the classes in dimension 1, as `torch.nn.functional.cross_entropy` has them: sequences
(B, C, T), maps (B, C, H, W). A position is one of B x the rest; a row is a position's C logits.
"""

import math
from numbers import Real

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

UNORDERED = (torch.int64, torch.int32)  # what torch indexes with


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks on: tensors may have no values to read, and no one form of gradient."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64: half-precision logits are never subtracted as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def positions_of(logits: Tensor) -> tuple[int, ...]:
    """(B,) of (B, C), (B, H, W) of (B, C, H, W)."""
    return logits.shape[:1] + logits.shape[2:]


def as_rows(logits: Tensor) -> Tensor:
    """(B, C, *) -> (positions, C); nothing is copied where the classes lie side by side, as in channels_last."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2).contiguous()


def checked_kind(name: str, logits: Tensor) -> None:
    """Raises ValueError for no tensor, and for one whose numbers are no logits."""
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{name} logits must be a tensor, got {type(logits).__name__}; pass the logits of what the network returns"
        )
    if not logits.is_floating_point():
        raise ValueError(
            f"{name} logits must be of a floating dtype, got {logits.dtype}; pass what the network returns, before argmax"
        )


def checked_logits(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError where they are not two tensors of one shape (B, C, *) with C >= 2."""
    checked_kind("student", student)
    checked_kind("teacher", teacher)
    if student.shape != teacher.shape or student.ndim < 2 or student.shape[1] < 2 or not student.numel():
        raise ValueError(
            "student and teacher logits must both be (B, C) with C >= 2, or (B, C, H, W) with the classes in dimension 1, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; (B, T, C) flattens to (B, C): logits.flatten(0, 1)"
        )


def told_apart(logits: Tensor, labels: Tensor | None, counted: Tensor | None) -> None:
    """Raises ValueError for logits of three dimensions whose positions neither labels nor counted show: which is the classes'?"""
    if logits.ndim == 3 and labels is None and counted is None:
        raise ValueError(
            f"logits {tuple(logits.shape)} could be (B, C, T) or (B, T, C): pass counted (B, T) bool, which positions count, with the "
            "classes in dimension 1, or flatten them to (B, C)"
        )


def checked_counted(counted: Tensor | None, logits: Tensor) -> Tensor | None:
    """The mask as (positions,) bool. Raises ValueError where it is no bool tensor of the logits' positions."""
    if counted is None:
        return None
    wanted = tuple(positions_of(logits))
    if not isinstance(counted, Tensor) or counted.dtype != torch.bool or tuple(counted.shape) != wanted:
        raise ValueError(
            f"counted must be {wanted} of bool, True where a position counts, for logits {tuple(logits.shape)}, got "
            f"{_described(counted)}{_transposed(counted, logits)}"
        )
    return counted.flatten()


def checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Classes as (positions,) int64 or int32. Raises ValueError for another shape than the logits' positions or no integers."""
    wanted = tuple(positions_of(logits))
    if not _are_integers(labels) or tuple(labels.shape) != wanted:
        remedy = _transposed(labels, logits)
        if isinstance(labels, Tensor) and labels.shape == (*wanted, 1):
            remedy = "; pass labels.squeeze(-1)"
        elif isinstance(labels, Tensor) and labels.shape == logits.shape and not remedy:
            remedy = "; of one-hot or soft labels pass labels.argmax(1)"
        raise ValueError(
            f"labels must be {wanted} of an integer dtype, the classes of logits {tuple(logits.shape)}, got {_described(labels)}{remedy}"
        )
    return as_index(labels).flatten()


def checked_classes(labels: Tensor) -> Tensor:
    """Classes (B,) as int64 or int32. Raises ValueError for another shape or no integers."""
    if not _are_integers(labels) or labels.ndim != 1:
        raise ValueError(
            f"labels must be (B,) of an integer dtype, got {_described(labels)}; prior.at(labels) takes those of maps, "
            "labels.squeeze(-1) makes (B,) of (B, 1)"
        )
    return as_index(labels)


def as_index(labels: Tensor) -> Tensor:
    """Integers as torch indexes with them."""
    return labels if labels.dtype in UNORDERED else labels.long()


def checked_range(labels: Tensor, classes: int) -> None:
    """Raises ValueError for labels outside 0..classes - 1, on a CPU: on a GPU reading them back would stall every step."""
    if labels.device.type != "cpu" or not labels.numel() or transformed():
        return
    if torch.compiler.is_compiling():
        known = ((labels >= 0) & (labels < classes)).all()
        torch._assert_async(known, f"labels must lie in 0..{classes - 1}")
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels must lie in 0..{classes - 1}, got {low}..{high}; leave out what has no label by counted ((labels >= 0) & (labels < {classes}))"
        )


def checked_settings(**settings: object) -> None:
    """Raises ValueError for a setting that wants a gradient: none would reach it."""
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, since the loss gives it none; pass {name}.detach()"
            )


def checked_one_number(**settings: object) -> None:
    """Raises ValueError for a setting that is neither a number nor a tensor of one: several would be spread over rows or classes."""
    for name, value in settings.items():
        if isinstance(value, Tensor) and (value.ndim > 1 or value.numel() != 1):
            remedy = (
                "; to weigh each example, multiply what reduction='none' gives"
                if name in ("alpha", "beta")
                else ""
            )
            raise ValueError(f"{name} must be one number, got a tensor {tuple(value.shape)}{remedy}")
        if not isinstance(value, Tensor | int | float) and not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {type(value).__name__}")


def checked_above_zero(**temperatures: float | Tensor) -> None:
    """Raises ValueError for a temperature that is none; one in a tensor is looked at on a CPU alone, where nothing waits for it."""
    for name, value in temperatures.items():
        if _is_looked_at(value) and not 0.0 < value < math.inf:  # NaN, too
            raise ValueError(f"{name} must be a finite number above 0, got {float(value)}")


def checked_not_below_zero(**factors: float | Tensor) -> None:
    """Raises ValueError for a factor that would have a loss climbed, looked at as temperatures are, and in no graph of torch.compile."""
    if torch.compiler.is_compiling():  # a factor that is ramped makes no new graph
        return
    for name, value in factors.items():
        if _is_looked_at(value) and not 0.0 <= value < math.inf:  # NaN, too
            raise ValueError(f"{name} must be a finite number of at least 0, got {float(value)}")


def _is_looked_at(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or not (
        value.device.type != "cpu" or value.numel() != 1 or transformed() or torch.compiler.is_compiling()
    )


def checked_gamma(gamma: float) -> float:
    """gamma, as it is now of a tensor. Raises ValueError outside [0, 1]."""
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    return float(gamma) if isinstance(gamma, Tensor) else gamma


def checked_pair_weight(pair_weight: float | Tensor, positions: int) -> float | Tensor:
    """One number, or one for each position, (positions,). Raises ValueError."""
    if isinstance(pair_weight, Tensor) and pair_weight.numel() == positions:
        return pair_weight.flatten() if pair_weight.ndim else pair_weight
    if isinstance(pair_weight, Tensor) and pair_weight.numel() != 1:
        raise ValueError(
            f"pair_weight must be one number or one for each of the {positions} examples, got {tuple(pair_weight.shape)}"
        )
    checked_one_number(pair_weight=pair_weight)
    return pair_weight


def checked_weights(weights: Tensor, logits: Tensor) -> None:
    """Raises ValueError for no tensor, and for another shape than the logits'."""
    if not isinstance(weights, Tensor):
        raise ValueError(
            f"weights must be a tensor of the logits' shape, got {type(weights).__name__}; pass prior[labels], prior.at(labels) or "
            "None for softmax(teacher)"
        )
    if weights.shape != logits.shape:
        raise ValueError(
            f"gkl needs weights of the logits' shape {tuple(logits.shape)}, got {tuple(weights.shape)}; "
            "pass prior[labels], or None for softmax(teacher)"
        )


def checked_probabilities(weights: Tensor, counted: Tensor | None = None) -> None:
    """Raises ValueError for weights (B, C) or (B, C, S) that are no probabilities. counted: (positions,), which are looked at."""
    sums, least = at_least_float32(weights).sum(1).flatten(), weights.amin(1).flatten()
    if counted is not None:
        sums, least = torch.where(counted, sums, 1.0), torch.where(counted, least, 0.0)
    (low, high), smallest = (value.item() for value in sums.aminmax()), least.amin().item()
    if not (0.99 <= low and high <= 1.01 and smallest >= 0.0):  # written so that NaN fails too
        raise ValueError(
            "weights must be probabilities (rows that sum to 1, no entry below 0), got row sums "
            f"{low:g}..{high:g} and a smallest entry {smallest:g}; pass softmax(teacher) or prior[labels]"
        )


def _are_integers(labels: object) -> bool:
    return isinstance(labels, Tensor) and not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    )


def _described(found: object) -> str:
    return f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__


def _transposed(found: object, logits: Tensor) -> str:
    """What to do where the classes are in the last dimension."""
    if isinstance(found, Tensor) and logits.ndim > 2 and found.shape == logits.shape[:-1]:
        return f"; the classes belong in dimension 1: logits.movedim(-1, 1), or flatten {tuple(logits.shape)} to (B, C)"
    return ""
