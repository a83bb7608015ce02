"""The losses of the paper: KL, its decoupled form DKL, the generalized form GKL, the conference form IKL, and JSD.

    per_example = gkl_loss(adv_logits, clean_logits, prior[labels], alpha=20.0, beta=4.0, gamma=0.4, reduction="none")
    loss = F.cross_entropy(clean_logits, labels) + per_example.mean()

`student` is the paper's n (adversarial view, or student network), `teacher` its m (clean view, or teacher network).
`alpha` weighs wMSE with the 1/4 of Eq. 13 inside, so the paper's "alpha/4 = 5" is `alpha=20`; `beta` weighs the
cross-entropy. The authors' code swaps the two names. Everything is computed in float32 or better, also under autocast.
On a GPU with Triton, `gkl_loss` and what is made of it run as two kernels (`gkl.losses.triton_kernels`); float64 stays as it is.

This GKL is not the "generalized KL divergence" between unnormalised measures.
Source: arXiv 2503.08038.

One file, since the divergences and the autograd function that computes them are checked and read together.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from gkl.losses.prior import ClassPrior

Reduction = Literal["mean", "none"]
CACHED = 1 << 18  # entries of a (b, C) tensor of which several fit into a core's own cache
FAR = 16.0  # an offset that logits are rid of
HAS_TRITON = find_spec("triton") is not None


class ClassRows(NamedTuple):
    """Class-wise weights prior[labels], gathered where they are used; made by `prior.at(labels)`. labels: (B,) classes."""

    prior: "ClassPrior"
    labels: Tensor


def kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """KL(softmax(teacher/T) || softmax(student/T)) in nats (Eq. 2), with gradient to both; no factor T^2.

    student_logits, teacher_logits: (B, C). Returns the mean over the batch, or (B,) with reduction="none".
    """
    student, teacher = _logits(student_logits, teacher_logits)
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return _reduce(F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1), reduction)


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Jensen-Shannon divergence of the two softmax outputs in nats (Eq. 15), symmetric, at most log 2.

    student_logits, teacher_logits: (B, C). Returns the mean over the batch, or (B,) with reduction="none".
    """
    student, teacher = _logits(student_logits, teacher_logits)
    log_student, log_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    log_middle = torch.logaddexp(log_student, log_teacher) - torch.log(torch.tensor(2.0, dtype=student.dtype))
    to_middle = [
        F.kl_div(log_middle, log_p, log_target=True, reduction="none").sum(-1)
        for log_p in (log_student, log_teacher)
    ]
    return _reduce(0.5 * (to_middle[0] + to_middle[1]), reduction)


def dkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled KL (Eq. 5): wMSE reaches only the teacher, the cross-entropy only the student.

    At alpha = beta = 1 its gradients are those of `kl`, its value is not (Theorem 1).
    student_logits, teacher_logits: (B, C). Returns the mean over the batch, or (B,) with reduction="none".
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
    pair_weight: float | Tensor | Callable[[Tensor], Tensor] | None = None,
    break_asymmetry: bool = True,
    validate: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Generalized KL (Eq. 13 as Algorithm 1 computes it): alpha * wMSE + beta * cross-entropy.

    wMSE   1/4 sum_jk (w_j w_k)^gamma ((t_j - t_k) - (s_j - s_k))^2 / (mean over the batch of sum_jk (w_j w_k)^gamma),
           computed as 1/2 W sum_j v_j (d_j - mean_v d)^2 with d = t - s, v = w^gamma, W = sum_j v_j: O(B C), no
           cancellation, on the raw logits whatever the temperature. Gradient to student and teacher.
    CE     - sum_j softmax(t/T)_j log softmax(s/T)_j, in nats. Gradient to the student alone; no factor T^2.

    student_logits, teacher_logits: (B, C); of a map (N, C, H, W) the pixels, x.permute(0, 2, 3, 1).flatten(0, 2), which copies
    nothing in channels_last. weights: (B, C), rows are probabilities, no gradient flows into them: `prior[labels]`
    or, without making them, `prior.at(labels)` (class-wise); None for softmax(teacher / weights_temperature) (sample-wise).
    gamma: exponent in [0, 1]; 0 weighs all pairs alike. temperature: T of the cross-entropy alone.
    pair_weight: the divisor of wMSE where it is not this batch's own mean of W^2, for instance the mean over the
    batches of all processes (see `mean_pair_weight`), or (B,), one for each example, or what gives it of the W^2 (B,);
    1 gives Eq. 13 without normalisation.
    break_asymmetry: False keeps wMSE's gradient from the student, as in DKL.
    validate: False skips the check of the weights' values, which on a GPU waits for the device.
    Returns the mean over the batch, or (B,) with reduction="none".
    Raises ValueError for shapes that differ, C < 2, gamma outside [0, 1] or weights that are no probabilities.
    """
    _check_logits(student_logits, teacher_logits)
    _check_gamma(gamma)
    _check_weights(weights, student_logits, validate)
    device = student_logits.device.type
    half = torch.is_autocast_enabled(device)  # it would take the dot products to half precision
    with torch.autocast(device, enabled=False) if half else nullcontext():
        if _fused(student_logits, teacher_logits, weights):
            table, labels = weights.detach() if isinstance(weights, Tensor) else None, None
            if isinstance(weights, ClassRows):
                table, labels = weights.prior.table(gamma)[0], weights.labels
            mean = _is_mean(reduction)
            return _triton_form().apply(
                student_logits, teacher_logits, table, labels, alpha, beta, gamma, temperature,
                weights_temperature, pair_weight, break_asymmetry, mean,
            )  # fmt: skip
        dtype = _dtype(student_logits, teacher_logits)
        sums = teacher_probs = None
        if weights is None:
            smoothed, total, probs = _sample_wise(teacher_logits.detach(), gamma, weights_temperature, dtype)
            teacher_probs = probs if weights_temperature == temperature else None
        elif isinstance(weights, Tensor):
            smoothed = smooth(at_least_float32(weights.detach()), gamma, validate=False)
            sums = total = smoothed.sum(-1, dtype=dtype)
        else:
            smoothed = weights.prior.rows(weights.labels, gamma)
            sums = total = weights.prior.totals(weights.labels, gamma).to(dtype)
        squares = total.square()
        if pair_weight is None or callable(pair_weight):
            pair_weight = squares.mean() if pair_weight is None else pair_weight(squares)
        scale = (squares if sums is None else total) * alpha / pair_weight
        per_example = _ClosedForm.apply(
            student_logits,
            teacher_logits,
            smoothed,
            sums,
            scale,
            teacher_probs,
            beta,
            temperature,
            break_asymmetry,
        )
    return _reduce(per_example, reduction)


gkl = gkl_loss  # the name up to 0.1; imported by itself, it hides the package `gkl`


def smooth(weights: Tensor, gamma: float, *, validate: bool = True) -> Tensor:
    """weights ** gamma, the smoothed weights of Eq. 12. weights: (B, C), rows are probabilities.

    Raises ValueError for gamma outside [0, 1] or, with `validate`, rows that are no probabilities.
    """
    _check_gamma(gamma)
    if validate:
        _check_probabilities(weights)
    if gamma == 1.0:
        return weights
    if gamma == 0.0:
        return torch.ones_like(weights)
    return weights.log().mul_(gamma).exp_()  # a third of the time of pow; 0 stays 0


def mean_pair_weight(weights: Tensor, gamma: float) -> Tensor:
    """Mean over the batch of sum_jk (w_j w_k)^gamma = (sum_j w_j^gamma)^2, the divisor of wMSE. weights: (B, C)."""
    return smooth(weights, gamma, validate=False).sum(-1).square().mean()


def _sample_wise(
    teacher: Tensor, gamma: float, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sample-wise weights of Eq. 12, w = softmax(teacher / temperature): u = w^gamma / W (B, C), W = sum_j w_j^gamma (B,), w (B, C).

    u is the softmax of gamma * teacher / temperature, and any entry tells W = w_j^gamma / u_j: the largest does not vanish.
    """
    _check_gamma(gamma)

    def compute(
        teacher: Tensor, u: Tensor | None = None, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        scaled = _tempered(teacher.to(dtype), temperature)
        if gamma == 1.0:
            u = w = torch.softmax(scaled, -1, out=w)
        else:  # of log w, since gamma times logits with an offset would round it
            log_w = torch.log_softmax(scaled, -1)
            w = torch.exp(log_w, out=w)
            u = torch.softmax(log_w.mul_(gamma), -1, out=u)
        return u, w.amax(-1).pow_(gamma).div_(u.amax(-1)), w

    if len(parts := _parts(teacher)) == 1:
        return compute(teacher)
    u, w = (torch.empty_like(teacher, dtype=dtype) for _ in range(2))
    total = torch.cat([compute(teacher[part], u[part], w[part])[1] for part in parts])
    return w if gamma == 1.0 else u, total, w


class _ClosedForm(torch.autograd.Function):
    """(B,) values of alpha * wMSE + beta * CE; their gradients come in closed form on the way and are all that is saved.

    Rows are independent but for `scale`, so they are worked on in parts (see _parts).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        smoothed: Tensor,
        sums: Tensor | None,
        scale: Tensor,
        teacher_probs: Tensor | None,
        beta: float,
        temperature: float,
        break_asymmetry: bool,
    ) -> Tensor:
        """smoothed: (B, C); sums: its rows', where they are not 1. scale: (B,), of 1/2 sum_j smoothed_j (d_j - mean d)^2.

        teacher_probs: softmax(teacher / temperature) where it is there already; becomes the gradient, so no one else may hold it.
        """
        dtype = _dtype(student, teacher)
        needed = ctx.needs_input_grad[:2]
        compute = partial(
            _with_gradients,
            dtype=dtype,
            beta=beta,
            temperature=temperature,
            break_asymmetry=break_asymmetry,
            needed=needed,
        )
        rows = (student, teacher, smoothed, scale)
        if len(parts := _parts(student)) == 1:
            value, *grads = compute(*rows, sums, teacher_probs)
        else:
            value = torch.empty_like(scale, dtype=dtype)
            grads = [torch.empty_like(student, dtype=dtype) if each else None for each in needed]
            if teacher_probs is not None and needed[0]:
                grads[0] = teacher_probs
            for part in parts:
                known = [None if x is None else x[part] for x in (sums, teacher_probs, *grads)]
                value[part], *_ = compute(*(x[part] for x in rows), *known)
        ctx.save_for_backward(*grads)
        ctx.dtypes = student.dtype, teacher.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        each = grad.unsqueeze(-1)  # (B, 1)
        return (
            None if student is None else (student * each).to(ctx.dtypes[0]),
            None if teacher is None else (teacher * each).to(ctx.dtypes[1]),
            *[None] * 7,
        )


def _with_gradients(
    student: Tensor, teacher: Tensor, smoothed: Tensor, scale: Tensor, sums: Tensor | None, teacher_probs: Tensor | None,
    to_student: Tensor | None = None, to_teacher: Tensor | None = None,
    *, dtype: torch.dtype, beta: float, temperature: float, break_asymmetry: bool, needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Values (b,) of rows, and their gradients (b, C) to student and teacher where needed, in the tensors given for them.

    Arguments as in _ClosedForm.
    """
    student, teacher, smoothed, scale = (
        student.to(dtype),
        teacher.to(dtype),
        smoothed.to(dtype),
        scale.to(dtype),
    )
    difference = teacher - student  # exact where the two are alike, so a common offset costs no digit
    log_probs = F.log_softmax(_tempered(student, temperature), dim=-1)
    if teacher_probs is None:
        teacher_probs = F.softmax(_tempered(teacher, temperature), dim=-1)
    log_likelihood = torch.linalg.vecdot(teacher_probs, log_probs)  # minus the cross-entropy
    mean = _mean(smoothed, difference, sums)
    if _far(mean):
        student, teacher = _without_offsets(student, teacher, mean)
        difference = teacher - student
        mean = _mean(smoothed, difference, sums)
    difference -= mean.unsqueeze(-1)
    pull = smoothed * difference
    half = torch.linalg.vecdot(pull, difference)
    # A tensor of its own: torch 2.11's compiler gives zero gradients for a result that is an intermediate changed in place.
    value = torch.addcmul(log_likelihood.mul_(-beta), half, scale, value=0.5)
    scale = scale.unsqueeze(-1)
    if needed[0]:
        to_student = torch.sub(
            log_probs.exp_(), teacher_probs, out=log_probs if to_student is None else to_student
        ).mul_(beta / temperature)
        if break_asymmetry:
            to_student.addcmul_(pull, scale, value=-1.0)
    if needed[1]:
        to_teacher = torch.mul(pull, scale, out=pull if to_teacher is None else to_teacher)
    return value, to_student, to_teacher


def _mean(smoothed: Tensor, difference: Tensor, sums: Tensor | None) -> Tensor:
    """Of each row's difference (b,) under its weights. sums: the weights', where they are not 1."""
    mean = torch.linalg.vecdot(smoothed, difference)
    return mean if sums is None else mean.div_(sums)


def _without_offsets(student: Tensor, teacher: Tensor, offsets: Tensor) -> list[Tensor]:
    """Both, each less its own largest entry in the rows whose offset (b,) costs digits; in whole numbers, so that it is exact.

    Row by row: what becomes of one does not depend on the others it is computed with.
    """
    far = (offsets.abs() > FAR).unsqueeze(-1)
    largest = [x.amax(-1, keepdim=True).round_() for x in (student, teacher)]
    return [x - torch.where(far, most, 0.0) for x, most in zip((student, teacher), largest, strict=True)]


def _far(offsets: Tensor) -> bool:
    """Whether any of the rows' offsets (b,) costs digits: yes where none is looked at, off the CPU or in a graph."""
    if not offsets.is_cpu or torch.compiler.is_compiling():
        return True
    # The sum of squares is quickly computed and settles it for most batches.
    return offsets.dot(offsets).item() > FAR**2 and offsets.abs().amax().item() > FAR


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature up to a shift of each row: the largest is taken off first, so that the quotient rounds no offset."""
    return logits if temperature == 1.0 else (logits - logits.amax(-1, keepdim=True)).div_(temperature)


def _parts(logits: Tensor) -> list[slice]:
    """Rows that are worked on together: on a CPU as many as its cache holds, so that a pass over them costs no memory traffic."""
    whole = logits.device.type != "cpu" or torch.compiler.is_compiling()
    rows = len(logits) if whole else max(1, CACHED // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


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


def _triton_form() -> type[torch.autograd.Function]:
    # Imported when first wanted: a machine without a GPU may have no Triton.
    from gkl.losses.triton_kernels import TritonGKL

    return TritonGKL


def _dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """What the closed form is computed in."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64: half-precision logits are never subtracted as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits as (B, C) in one dtype of at least float32."""
    _check_logits(student, teacher)
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 2 or student.shape[0] < 1:
        raise ValueError(
            f"student and teacher logits must both be (B, C) with C >= 2, got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}; flatten other dimensions into B"
        )


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:1] or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"the prior's labels must be ({len(logits)},) of int64 or int32, got {tuple(labels.shape)} of {labels.dtype}"
        )


def _check_gamma(gamma: float) -> None:
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")


def _check_weights(weights: Tensor | ClassRows | None, logits: Tensor, values: bool) -> None:
    """values: whether they are looked at."""
    if isinstance(weights, ClassRows):
        _check_labels(weights.labels, logits)
    elif weights is not None:
        if weights.shape != logits.shape:
            raise ValueError(
                f"gkl needs weights of the logits' shape {tuple(logits.shape)}, got {tuple(weights.shape)}; "
                "pass prior[labels], or None for softmax(teacher)"
            )
        if values:
            _check_probabilities(weights)


def _check_probabilities(weights: Tensor) -> None:
    low, high = (value.item() for value in at_least_float32(weights).sum(-1).aminmax())
    smallest = weights.amin().item()
    if not (0.99 <= low and high <= 1.01 and smallest >= 0.0):  # written so that NaN fails too
        raise ValueError(
            "weights must be probabilities (rows that sum to 1, no entry below 0), got row sums "
            f"{low:g}..{high:g} and a smallest entry {smallest:g}; pass softmax(teacher) or prior[labels]"
        )


def _reduce(per_example: Tensor, reduction: Reduction) -> Tensor:
    return per_example.mean() if _is_mean(reduction) else per_example


def _is_mean(reduction: Reduction) -> bool:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return reduction == "mean"
