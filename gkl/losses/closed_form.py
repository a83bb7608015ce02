"""The losses of the paper: KL, its decoupled form DKL, the generalized form GKL, the conference form IKL, and JSD.

    per_example = gkl_loss(adv_logits, clean_logits, prior[labels], alpha=20.0, beta=4.0, gamma=0.4, reduction="none")
    loss = F.cross_entropy(clean_logits, labels) + per_example.mean()

`student` is the paper's n (adversarial view, or student network), `teacher` its m (clean view, or teacher network).
`alpha` weighs wMSE with the 1/4 of Eq. 13 inside, so the paper's "alpha/4 = 5" is `alpha=20`; `beta` weighs the
cross-entropy. The authors' code swaps the two names. Everything is computed in float32 or better, also under autocast.
On a GPU with Triton, `gkl_loss` and what is made of it run as two kernels (`gkl.losses.triton_kernels`); float64 stays as it is.
Logits are (B, C), or (B, C, *) with the classes in dimension 1; `counted` (B, *) says which positions count, all others give
nothing, get a gradient of zero and may hold anything, NaN too. Under torch.func, and where create_graph asks for it, the loss is
an expression that autograd differentiates as often as it likes.

This GKL is not the "generalized KL divergence" between unnormalised measures.
Source: arXiv 2503.08038.

One file, since the divergences take, check and reduce the same things; their gradients are in `gkl.losses.gradients`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.losses.gradients import ClosedForm, SampleWise, common_dtype, expressed_values
from gkl.losses.inputs import (
    as_rows,
    at_least_float32,
    checked_above_zero,
    checked_counted,
    checked_gamma,
    checked_labels,
    checked_logits,
    checked_not_below_zero,
    checked_one_number,
    checked_pair_weight,
    checked_probabilities,
    checked_settings,
    checked_weights,
    positions_of,
    told_apart,
    transformed,
)
from gkl.losses.parts import as_classes, parts, positions

if TYPE_CHECKING:
    from gkl.losses.prior import ClassPrior

Reduction = Literal["mean", "none"]
PairWeight = float | Tensor | Callable[[Tensor], Tensor] | None
HAS_TRITON = find_spec("triton") is not None


class ClassRows(NamedTuple):
    """Class-wise weights prior[labels], gathered where they are used; made by `prior.at(labels)`. labels: (B,) or (B, *) classes."""

    prior: "ClassPrior"
    labels: Tensor


def kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    counted: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(softmax(teacher/T) || softmax(student/T)) in nats (Eq. 2), with gradient to both; no factor T^2.

    student_logits, teacher_logits, counted, result: as `gkl_loss`.
    """
    checked_one_number(temperature=temperature)
    checked_above_zero(temperature=temperature)
    student, teacher = _logits(student_logits, teacher_logits, counted)
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    each = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)
    return _reduce(each, reduction, student_logits, counted)


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    counted: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Jensen-Shannon divergence of the two softmax outputs in nats (Eq. 15), symmetric, at most log 2.

    student_logits, teacher_logits, counted, result: as `gkl_loss`.
    """
    student, teacher = _logits(student_logits, teacher_logits, counted)
    log_student, log_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    log_middle = torch.logaddexp(log_student, log_teacher) - torch.log(torch.tensor(2.0, dtype=student.dtype))
    to_middle = [
        F.kl_div(log_middle, log_p, log_target=True, reduction="none").sum(-1)
        for log_p in (log_student, log_teacher)
    ]
    return _reduce(0.5 * (to_middle[0] + to_middle[1]), reduction, student_logits, counted)


def dkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    counted: Tensor | None = None,
    create_graph: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled KL (Eq. 5): wMSE reaches only the teacher, the cross-entropy only the student.

    At alpha = beta = 1 its gradients are those of `kl`, its value is not (Theorem 1).
    Arguments and result as `gkl_loss`.
    """
    return gkl_loss(
        student_logits,
        teacher_logits,
        None,
        alpha=alpha,
        beta=beta,
        gamma=1.0,
        pair_weight=1.0,
        break_asymmetry=False,
        counted=counted,
        create_graph=create_graph,
        reduction=reduction,
    )


def ikl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | ClassRows | None,
    *,
    alpha: float,
    beta: float,
    temperature: float = 1.0,
    weights_temperature: float = 1.0,
    counted: Tensor | None = None,
    create_graph: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Improved KL of the conference version: GKL at gamma = 1, wMSE divided by the batch size.

    Arguments and result as `gkl_loss`. Source: arXiv 2305.13948 and the authors' released v1 code.
    """
    return gkl_loss(
        student_logits,
        teacher_logits,
        weights,
        alpha=alpha,
        beta=beta,
        gamma=1.0,
        temperature=temperature,
        weights_temperature=weights_temperature,
        pair_weight=1.0,
        counted=counted,
        create_graph=create_graph,
        reduction=reduction,
    )


def gkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | ClassRows | None,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float = 1.0,
    weights_temperature: float = 1.0,
    pair_weight: PairWeight = None,
    break_asymmetry: bool = True,
    counted: Tensor | None = None,
    create_graph: bool = False,
    validate: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Generalized KL (Eq. 13 as Algorithm 1 computes it): alpha * wMSE + beta * cross-entropy.

    wMSE   1/4 sum_jk (w_j w_k)^gamma ((t_j - t_k) - (s_j - s_k))^2 / (mean over the batch of sum_jk (w_j w_k)^gamma),
           computed as 1/2 W sum_j v_j (d_j - mean_v d)^2 with d = t - s, v = w^gamma, W = sum_j v_j: O(B C), no
           cancellation, on the raw logits whatever the temperature. Gradient to student and teacher.
    CE     - sum_j softmax(t/T)_j log softmax(s/T)_j, in nats. Gradient to the student alone; no factor T^2.

    student_logits, teacher_logits: (B, C), or (B, C, *) with the classes in dimension 1, whose B times * positions are the batch.
    weights: of the logits' shape, rows are probabilities, no gradient flows into them: `prior[labels]` or, without
    making them, `prior.at(labels)` (class-wise); None for softmax(teacher / weights_temperature) (sample-wise).
    gamma: exponent in [0, 1]; 0 weighs all pairs alike. temperature: T of the cross-entropy alone.
    pair_weight: the divisor of wMSE where it is not this batch's own mean of W^2, for instance the mean over the
    batches of all processes (see `mean_pair_weight`), or (B,), one for each example, or what gives it of the W^2 (B,), of
    those that count; 1 gives Eq. 13 without normalisation.
    break_asymmetry: False keeps wMSE's gradient from the student, as in DKL.
    counted: (B,) or (B, *) bool, which positions count (labels != 255); None for all. The others have no part in the means, a
    gradient of exactly zero, and may hold anything, NaN and labels that are no class included. Where none counts the loss is 0.
    create_graph: True for a gradient that is to be differentiated again, in which autograd goes through the equation: slower, and
    several further tensors of the logits' size. Under torch.func it is so by itself. False refuses a second differentiation.
    validate: False skips the check of the weights' values, which on a GPU waits for the device; torch.func skips it too.
    Returns the mean over the positions, or their values, (B,) or (B, *), with reduction="none".
    Raises ValueError for shapes that differ, C < 2, logits of integers, gamma outside [0, 1], alpha or beta below 0, temperatures not
    above 0, weights that are no probabilities, labels or counted of another shape or dtype, and settings that require a gradient.
    """
    checked_logits(student_logits, teacher_logits)
    numbers = {
        "alpha": alpha, "beta": beta, "gamma": gamma, "temperature": temperature, "weights_temperature": weights_temperature,
    }  # fmt: skip
    checked_one_number(**numbers)
    checked_settings(**numbers, pair_weight=pair_weight)
    gamma = checked_gamma(gamma)
    checked_above_zero(temperature=temperature, weights_temperature=weights_temperature)
    checked_not_below_zero(alpha=alpha, beta=beta)
    mask, weights = _checked_weighing(student_logits, weights, counted, validate)
    expressed = create_graph or transformed()
    student, teacher = (x if x.ndim == 2 else x.flatten(2) for x in (student_logits, teacher_logits))
    fused = not expressed and _fused(student, teacher, weights)
    if expressed or fused or student.stride(1) == 1:  # rows, too, where a map's classes lie side by side
        student, teacher = as_rows(student), as_rows(teacher)
        weights = as_rows(weights) if isinstance(weights, Tensor) else weights
    device = student.device.type
    half = torch.is_autocast_enabled(device)  # it would take the dot products to half precision
    with torch.autocast(device, enabled=False) if half else nullcontext():
        options = (
            alpha,
            beta,
            gamma,
            temperature,
            weights_temperature,
            _masked(pair_weight, mask, student_logits.numel() // student_logits.shape[1]),
            break_asymmetry,
        )
        if fused:
            alone = _is_mean(reduction) and mask is None
            value = _by_kernels(student, teacher, weights, mask, *options, alone)
            return value if alone else _reduce(value, reduction, student_logits, counted)
        value = _by_equation(student, teacher, weights, mask, *options, expressed)
    return _reduce(value, reduction, student_logits, counted)


gkl = gkl_loss  # the name up to 0.1; imported by itself, it hides the package `gkl`


def smooth(weights: Tensor, gamma: float, *, validate: bool = True) -> Tensor:
    """weights ** gamma, the smoothed weights of Eq. 12. weights: (B, C), rows are probabilities.

    Raises ValueError for gamma outside [0, 1] or, with `validate`, rows that are no probabilities.
    """
    checked_gamma(gamma)
    if validate:
        checked_probabilities(weights)
    if gamma == 1.0:
        return weights
    if gamma == 0.0:
        return torch.ones_like(weights)
    return weights.log().mul_(gamma).exp_()  # a third of the time of pow; 0 stays 0


def mean_pair_weight(weights: Tensor, gamma: float) -> Tensor:
    """Mean over the batch of sum_jk (w_j w_k)^gamma = (sum_j w_j^gamma)^2, the divisor of wMSE. weights: (B, C)."""
    return smooth(weights, gamma, validate=False).sum(-1).square().mean()


def _checked_weighing(
    logits: Tensor, weights: Tensor | ClassRows | None, counted: Tensor | None, validate: bool
) -> tuple[Tensor | None, Tensor | ClassRows | None]:
    """counted (positions,), and the weights: labels (positions,), or (B, C) or (B, C, S). Raises ValueError."""
    told_apart(logits, weights.labels if isinstance(weights, ClassRows) else None, counted)
    mask = checked_counted(counted, logits)
    if isinstance(weights, ClassRows):
        prior, labels = weights.prior, checked_labels(weights.labels, logits)
        if len(prior.probs) != logits.shape[1]:
            raise ValueError(
                f"the prior has {len(prior.probs)} classes, logits {tuple(logits.shape)} have {logits.shape[1]} in dimension 1"
            )
        return mask, ClassRows(prior, labels if mask is None else torch.where(mask, labels, 0))
    if weights is not None:
        checked_weights(weights, logits)
        weights = weights.detach() if weights.ndim == 2 else weights.detach().flatten(2)
        if validate and not transformed():
            checked_probabilities(weights, mask)
    return mask, weights


def _masked(pair_weight: PairWeight, mask: Tensor | None, positions: int) -> PairWeight:
    """The pair weight as it is of what counts: a number, a tensor, or what gives one of all W^2 (positions,). Raises ValueError."""
    if pair_weight is not None and not callable(pair_weight):
        checked_above_zero(pair_weight=pair_weight)
        return checked_pair_weight(pair_weight, positions)
    if mask is None:
        if pair_weight is None:
            return None
        return lambda squares: torch.as_tensor(
            checked_pair_weight(pair_weight(squares), positions), device=squares.device
        )
    if pair_weight is None:
        return lambda squares: torch.where(mask, squares, 0.0).sum() / mask.sum().clamp(min=1)
    return lambda squares: _one_number(pair_weight(squares[mask]))


def _one_number(pair_weight: Tensor) -> Tensor:
    if pair_weight.ndim:
        raise ValueError(
            f"a pair_weight made of the W^2 must be one number where counted is given, got {tuple(pair_weight.shape)}"
        )
    return pair_weight


def _by_kernels(
    student: Tensor, teacher: Tensor, weights: Tensor | ClassRows | None, mask: Tensor | None, alpha: float, beta: float,
    gamma: float, temperature: float, weights_temperature: float, pair_weight: PairWeight, break_asymmetry: bool, alone: bool,
) -> Tensor:  # fmt: skip
    """Values (positions,) by the Triton kernels, or with `alone` their mean. student, teacher: (positions, C)."""
    # Imported when first wanted: a machine without a GPU may have no Triton.
    from gkl.losses.triton_kernels import TritonGKL

    table, labels, power = (weights if isinstance(weights, Tensor) else None), None, gamma != 1.0
    if isinstance(weights, ClassRows):
        table, labels = weights.prior.probs.detach(), weights.labels
        if not weights.prior.is_read_anew():
            table, power = weights.prior.table(gamma)[0], False
    return TritonGKL.apply(
        student, teacher, table, labels, mask, alpha, beta, gamma, temperature, weights_temperature, pair_weight,
        break_asymmetry, alone, power,
    )  # fmt: skip


def _by_equation(
    student: Tensor, teacher: Tensor, weights: Tensor | ClassRows | None, mask: Tensor | None, alpha: float, beta: float,
    gamma: float, temperature: float, weights_temperature: float, pair_weight: PairWeight, break_asymmetry: bool, expressed: bool,
) -> Tensor:  # fmt: skip
    """Values (positions,) in closed form, or `expressed` for autograd. student, teacher: (B, C) or (B, C, S)."""
    dtype = common_dtype(student, teacher)
    at = student.shape[:1] + student.shape[2:]  # of what there is one of at each position
    labels = teacher_probs = None
    smoothed: Tensor | SampleWise
    if weights is None:
        smoothed, logits = SampleWise(gamma, weights_temperature, dtype), teacher.detach()
        if expressed or len(parts(logits)) == 1:
            smoothed, sums, probs = smoothed(logits)
            teacher_probs = probs if weights_temperature == temperature else None
        else:  # made again where they are used, for no tensor of the map's size is kept
            sums = torch.empty(at, dtype=dtype, device=logits.device)
            for part in parts(logits):
                sums[positions(part)] = smoothed.totals(logits[part])
    elif isinstance(weights, Tensor):
        smoothed = smooth(at_least_float32(weights), gamma, validate=False)
        sums = smoothed.sum(1, dtype=dtype)
    else:
        prior, labels = weights
        sums = prior.totals(labels, gamma).to(dtype).view(at)
        if expressed or prior.is_read_anew():
            smoothed, labels = as_classes(prior.rows(labels, gamma), student), None
        else:
            smoothed, labels = prior.table(gamma)[0], labels.view(at)
    if pair_weight is None or callable(pair_weight):
        squares = sums.flatten().square()
        pair_weight = squares.mean() if pair_weight is None else pair_weight(squares)
        checked_settings(pair_weight=pair_weight)
    scale = (sums.flatten() * alpha / pair_weight).view(at)
    if expressed and isinstance(smoothed, Tensor):
        if mask is not None:
            student, teacher = (torch.where(mask.unsqueeze(-1), x, 0.0) for x in (student, teacher))
        return expressed_values(
            student.to(dtype), teacher.to(dtype), smoothed, sums, scale, beta, temperature, break_asymmetry
        )
    mask = None if mask is None else mask.view(at)
    return ClosedForm.apply(
        student, teacher, smoothed, labels, sums, scale, teacher_probs, mask, beta, temperature, break_asymmetry
    ).flatten()  # fmt: skip


def _fused(student: Tensor, teacher: Tensor, weights: Tensor | ClassRows | None) -> bool:
    """Whether the Triton kernels take these: all on one GPU that Triton knows, no float64."""
    # get_device_properties, since torch.compile can fold it into a constant and get_device_capability not.
    beside = weights.labels if isinstance(weights, ClassRows) else teacher if weights is None else weights
    return (
        HAS_TRITON
        and student.is_cuda
        and student.device == teacher.device == beside.device
        and torch.float64 not in (student.dtype, teacher.dtype)
        and torch.cuda.get_device_properties(student.device).major >= 7
    )


def _logits(student: Tensor, teacher: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both logits as rows (positions, C) in one dtype of at least float32, zero where they are not counted."""
    checked_logits(student, teacher)
    told_apart(student, None, counted)
    mask = checked_counted(counted, student)
    student, teacher = (as_rows(x).to(common_dtype(student, teacher)) for x in (student, teacher))
    if mask is not None:
        student, teacher = (torch.where(mask.unsqueeze(-1), x, 0.0) for x in (student, teacher))
    return student, teacher


def _reduce(each: Tensor, reduction: Reduction, logits: Tensor, counted: Tensor | None) -> Tensor:
    """Values (positions,) of logits as the mean over those that are counted, or shaped as these are."""
    mean = _is_mean(reduction)
    if counted is None:
        return each.mean() if mean else each if logits.ndim == 2 else each.view(positions_of(logits))
    each = torch.where(counted, each.view(positions_of(logits)), 0.0)
    return each.sum() / counted.sum().clamp(min=1) if mean else each


def _is_mean(reduction: Reduction) -> bool:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return reduction == "mean"
