"""GKL of rows and its gradients in closed form: what `gkl.losses.closed_form` hands to autograd, and an expression of the same.

    values = ClosedForm.apply(student, teacher, smoothed, labels, sums, scale, None, None, beta, temperature, True)      # (B,)

Gradients come on the way to the values and are all that is saved. What is to be differentiated again is refused, or expressed.
One file, since a gradient is read beside the value it belongs to.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.losses.inputs import as_rows, checked_gamma, transformed
from gkl.losses.parts import broadcast, part_of, parts, put_part, shaped

FAR = 16.0  # an offset that logits are rid of


class ClosedForm(torch.autograd.Function):
    """(positions,) values of alpha * wMSE + beta * CE; their gradients come in closed form on the way and are all that is saved.

    Rows are independent but for `scale`, so they are worked on in parts (see parts).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        smoothed: Tensor,
        labels: Tensor | None,
        sums: Tensor | None,
        scale: Tensor,
        teacher_probs: Tensor | None,
        counted: Tensor | None,
        beta: float,
        temperature: float,
        break_asymmetry: bool,
    ) -> Tensor:
        """student, teacher: (B, C) or (B, C, S). smoothed: as these, or their rows (positions, C), or with labels a table of them.

        sums: the rows' of smoothed, where they are not 1. scale: (positions,), of 1/2 sum_j smoothed_j (d_j - mean d)^2.
        teacher_probs: softmax(teacher / temperature) where it is there already; becomes the gradient, so no one else may hold it.
        """
        dtype = common_dtype(student, teacher)
        needed = ctx.needs_input_grad[:2]
        compute: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] = partial(
            _with_gradients,
            dtype=dtype,
            beta=beta,
            temperature=temperature,
            break_asymmetry=break_asymmetry,
            needed=needed,
        )
        all_parts = parts(student)
        if len(all_parts) == 1:
            weights = as_rows(smoothed) if labels is None else smoothed.index_select(0, labels)
            probs = None if teacher_probs is None else as_rows(teacher_probs)
            value, *found = compute(
                as_rows(student), as_rows(teacher), weights, scale, sums, counted, probs, None, None
            )
            grads = [None if x is None else shaped(x, student) for x in found]
        else:
            value = torch.empty_like(scale, dtype=dtype)
            grads = [torch.empty_like(student, dtype=dtype) if each else None for each in needed]
            if teacher_probs is not None and needed[0]:
                grads[0] = teacher_probs
            for part, rows in all_parts:
                if labels is not None:
                    weights = smoothed.index_select(0, labels[rows])
                else:
                    weights = part_of(smoothed, part) if smoothed.ndim == 3 else smoothed[rows]
                known = [None if x is None else x[rows] for x in (sums, counted)]
                probs = None if teacher_probs is None else part_of(teacher_probs, part)
                # The rows of a (B, C) tensor lie where they are written; those of a map are made apart.
                places = [None if x is None or x.ndim == 3 else x[part] for x in grads]
                logits = part_of(student, part), part_of(teacher, part)
                value[rows], *found = compute(*logits, weights, scale[rows], *known, probs, *places)
                for whole, made in zip(grads, found, strict=True):
                    if whole is not None and made is not None and whole.ndim == 3:
                        put_part(whole, part, made)
        held = [
            x if each and torch.compiler.is_compiling() else None
            for x, each in zip((student, teacher), needed, strict=True)
        ]
        ctx.save_for_backward(*grads, *held)
        ctx.dtypes = student.dtype, teacher.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients, from those of the values."""
        *grads, student, teacher = ctx.saved_tensors
        grad = first_derivative(grad, student, teacher)
        return (
            *(
                None if x is None else (x * broadcast(grad, x)).to(dtype)
                for x, dtype in zip(grads, ctx.dtypes, strict=True)
            ),
            *[None] * 9,
        )


def _with_gradients(
    student: Tensor, teacher: Tensor, smoothed: Tensor, scale: Tensor, sums: Tensor | None, counted: Tensor | None,
    teacher_probs: Tensor | None, to_student: Tensor | None, to_teacher: Tensor | None,
    *, dtype: torch.dtype, beta: float, temperature: float, break_asymmetry: bool, needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Values (b,) of rows, and their gradients (b, C) to student and teacher where needed, in the tensors given for them.

    Arguments as in ClosedForm.
    """
    student, teacher, smoothed, scale = (
        student.to(dtype),
        teacher.to(dtype),
        smoothed.to(dtype),
        scale.to(dtype),
    )
    difference = (
        teacher - student
    )  # (b, C), d of Eq. 13; exact where the two are alike, so a common offset costs no digit
    log_probs = F.log_softmax(_tempered(student, temperature), dim=-1)
    if teacher_probs is None:
        teacher_probs = F.softmax(_tempered(teacher, temperature), dim=-1)
    log_likelihood = torch.linalg.vecdot(teacher_probs, log_probs)  # (b,), minus the cross-entropy of Eq. 13
    mean = _mean(smoothed, difference, sums)  # (b,)
    if _far(mean):
        student, teacher = _without_offsets(student, teacher, mean)
        difference = teacher - student
        mean = _mean(smoothed, difference, sums)
    difference -= mean.unsqueeze(-1)
    # 1/4 sum_jk v_j v_k (d_j - d_k)^2 = 1/2 W sum_j v_j (d_j - mean_v d)^2, v = w^gamma, W = sum_j v_j: C operations for Eq. 13's C^2.
    pull = smoothed * difference  # (b, C), v_j (d_j - mean d): wMSE's gradient up to the row's scale
    half = torch.linalg.vecdot(pull, difference)  # (b,)
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
    if counted is not None:
        ignored = ~counted
        value.masked_fill_(ignored, 0.0)
        for gradient in (to_student, to_teacher):
            if gradient is not None:
                gradient.masked_fill_(ignored.unsqueeze(-1), 0.0)
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
    largest = [x.detach().amax(-1, keepdim=True).round_() for x in (student, teacher)]
    return [x - torch.where(far, most, 0.0) for x, most in zip((student, teacher), largest, strict=True)]


def _far(offsets: Tensor) -> bool:
    """Whether any of the rows' offsets (b,) costs digits: yes where none is looked at, off the CPU or in a graph."""
    if not offsets.is_cpu or torch.compiler.is_compiling():
        return True
    # The sum of squares is quickly computed and settles it for most batches. A NaN in one row hides no other's offset.
    return not (offsets.dot(offsets).item() <= FAR**2 or offsets.abs().amax().item() <= FAR)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature up to a shift of each row: the largest is taken off first, so that the quotient rounds no offset."""
    return logits if temperature == 1.0 else (logits - logits.detach().amax(-1, keepdim=True)) / temperature


def first_derivative(grad: Tensor, *logits: Tensor | None) -> Tensor:
    """What comes to a backward in closed form. Raises RuntimeError where that is to be differentiated itself: it would count as a constant.

    logits: both, where torch.compile makes a graph: a backward that holds what requires a gradient refuses by itself.
    """
    if torch.compiler.is_compiling():
        return torch.ops.gkl.first_derivative(grad, *logits)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the gradient of gkl_loss (dkl, ikl, GKLLoss) is to be differentiated again (create_graph=True), which its closed form "
            "cannot be: pass create_graph=True to the loss too"
        )
    return grad


@torch.library.custom_op("gkl::first_derivative", mutates_args=())
def _(grad: Tensor, student: Tensor | None, teacher: Tensor | None) -> Tensor:
    return grad.clone()


@torch.library.register_fake("gkl::first_derivative")
def _(grad: Any, student: Any, teacher: Any) -> Tensor:
    return torch.empty_like(grad)


def expressed_values(
    student: Tensor, teacher: Tensor, smoothed: Tensor, sums: Tensor | None, scale: Tensor, beta: float, temperature: float,
    break_asymmetry: bool,
) -> Tensor:  # fmt: skip
    """Values (b,) of rows by operations that autograd and torch.func follow to any order. Arguments as in ClosedForm."""
    mean = _mean(smoothed, (teacher - student).detach(), sums)
    student, teacher = _without_offsets(student, teacher, mean)
    likelihood = F.softmax(_tempered(teacher.detach(), temperature), dim=-1)
    entropy = -(likelihood * F.log_softmax(_tempered(student, temperature), dim=-1)).sum(-1)
    difference = teacher - (student if break_asymmetry else student.detach())
    weighted = (smoothed * difference).sum(-1, keepdim=True)
    deviation = difference - (weighted if sums is None else weighted / sums.unsqueeze(-1))
    return beta * entropy + 0.5 * scale * (smoothed * deviation.square()).sum(-1)


def sample_wise(
    teacher: Tensor, gamma: float, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sample-wise weights of Eq. 12, w = softmax(teacher / temperature): u = w^gamma / W, W = sum_j w_j^gamma (positions,), w.

    u is the softmax of gamma * teacher / temperature, and any entry tells W = w_j^gamma / u_j: the largest does not vanish.
    teacher, u and w: (B, C) or (B, C, S).
    """
    checked_gamma(gamma)

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

    if teacher.ndim == 2 and (transformed() or len(parts(teacher)) == 1):
        return compute(teacher)
    u, w = (torch.empty_like(teacher, dtype=dtype) for _ in range(2))
    totals = []
    for part, _ in parts(teacher):
        if teacher.ndim == 2:
            totals.append(compute(teacher[part], u[part], w[part])[1])
            continue
        made_u, total, made_w = compute(part_of(teacher, part))
        if gamma != 1.0:
            put_part(u, part, made_u)
        put_part(w, part, made_w)
        totals.append(total)
    return w if gamma == 1.0 else u, torch.cat(totals), w


def common_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """What the losses are computed in."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
