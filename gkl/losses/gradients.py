"""GKL of rows and its gradients in closed form: what `gkl.losses.closed_form` hands to autograd, and an expression of the same.

    values = ClosedForm.apply(student, teacher, smoothed, None, sums, scale, None, None, beta, temperature, True)         # (B,)

Gradients come on the way to the values and are all that is saved. What is to be differentiated again is refused, or expressed.
One file, since a gradient is read beside the value it belongs to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.losses.parts import as_classes, broadcast, parts, positions

FAR = 16.0  # an offset that logits are rid of


class ClosedForm(torch.autograd.Function):
    """Values (B,) or (B, S) of alpha * wMSE + beta * CE; their gradients come in closed form on the way and are all that is saved.

    Rows are independent but for `scale`, so they are worked on in parts (see parts).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        smoothed: "Tensor | SampleWise",
        labels: Tensor | None,
        sums: Tensor,
        scale: Tensor,
        teacher_probs: Tensor | None,
        counted: Tensor | None,
        beta: float,
        temperature: float,
        break_asymmetry: bool,
    ) -> Tensor:
        """student, teacher: (B, C) or (B, C, S). smoothed: as these, with labels (B,) or (B, S) a table of their rows, or what makes it.

        sums: of smoothed over the classes. scale: (B,) or (B, S), of 1/2 sum_j smoothed_j (d_j - mean d)^2.
        teacher_probs: softmax(teacher / temperature) where it is there already.
        """
        dtype = common_dtype(student, teacher)
        needed = ctx.needs_input_grad[:2]
        value = torch.empty_like(scale, dtype=dtype)
        grads: list[Tensor | None] = [None, None]
        all_parts = parts(student)
        if len(all_parts) > 1:
            grads = [torch.empty_like(student, dtype=dtype) if each else None for each in needed]
        for part in all_parts:
            here = positions(part)
            if isinstance(smoothed, SampleWise):
                weights, _, probs = smoothed(teacher[part])
                teacher_probs = probs if smoothed.temperature == temperature else None
            elif labels is not None:
                weights = as_classes(smoothed.index_select(0, labels[here].flatten()), teacher[part])
            else:
                weights = smoothed[part]
            known = None if counted is None else counted[here]
            places = [None if x is None else x[part] for x in grads]
            value[here], *found = _with_gradients(
                student[part], teacher[part], weights, scale[here], sums[here], known, teacher_probs, *places,
                dtype=dtype, beta=beta, temperature=temperature, break_asymmetry=break_asymmetry, needed=needed,
            )  # fmt: skip
            if len(all_parts) == 1:
                grads = found
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
    student: Tensor, teacher: Tensor, smoothed: Tensor, scale: Tensor, sums: Tensor, counted: Tensor | None,
    teacher_probs: Tensor | None, to_student: Tensor | None, to_teacher: Tensor | None,
    *, dtype: torch.dtype, beta: float, temperature: float, break_asymmetry: bool, needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Values (b,) or (b, s), and their gradients to student and teacher where needed, in the tensors given for them.

    Arguments as in ClosedForm; the classes of (b, C) and (b, C, s) alike are in dimension 1.
    """
    student, teacher, smoothed, scale = (
        student.to(dtype),
        teacher.to(dtype),
        smoothed.to(dtype),
        scale.to(dtype),
    )
    difference = (
        teacher - student
    )  # d of Eq. 13; exact where the two are alike, so a common offset costs no digit
    log_probs = F.log_softmax(_tempered(student, temperature), dim=1)
    if teacher_probs is None:
        teacher_probs = F.softmax(_tempered(teacher, temperature), dim=1)
    log_likelihood = torch.linalg.vecdot(teacher_probs, log_probs, dim=1)  # minus the cross-entropy of Eq. 13
    mean = _mean(smoothed, difference, sums)
    if _far(mean):
        student, teacher = _without_offsets(student, teacher, mean)
        difference = teacher - student
        mean = _mean(smoothed, difference, sums)
    difference -= mean.unsqueeze(1)
    # 1/4 sum_jk v_j v_k (d_j - d_k)^2 = 1/2 W sum_j v_j (d_j - mean_v d)^2, v = w^gamma, W = sum_j v_j: C operations for Eq. 13's C^2.
    pull = smoothed * difference  # v_j (d_j - mean d): wMSE's gradient up to the row's scale
    half = torch.linalg.vecdot(pull, difference, dim=1)
    # A tensor of its own: torch 2.11's compiler gives zero gradients for a result that is an intermediate changed in place.
    value = torch.addcmul(log_likelihood.mul_(-beta), half, scale, value=0.5)
    scale = scale.unsqueeze(1)
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
                gradient.masked_fill_(ignored.unsqueeze(1), 0.0)
    return value, to_student, to_teacher


def _mean(smoothed: Tensor, difference: Tensor, sums: Tensor) -> Tensor:
    """Of each position's difference under its weights, whose sums are given."""
    return torch.linalg.vecdot(smoothed, difference, dim=1).div_(sums)


def _without_offsets(student: Tensor, teacher: Tensor, offsets: Tensor) -> list[Tensor]:
    """Both, each less its own largest entry at the positions whose offset costs digits; in whole numbers, so that it is exact.

    One by one: what becomes of one does not depend on the others it is computed with.
    """
    far = (offsets.abs() > FAR).unsqueeze(1)
    largest = [x.detach().amax(1, keepdim=True).round_() for x in (student, teacher)]
    return [x - torch.where(far, most, 0.0) for x, most in zip((student, teacher), largest, strict=True)]


def _far(offsets: Tensor) -> bool:
    """Whether any of the positions' offsets costs digits: yes where none is looked at, off the CPU or in a graph."""
    if not offsets.is_cpu or torch.compiler.is_compiling():
        return True
    # The sum of squares is quickly computed and settles it for most batches. A NaN at one hides no other's offset.
    offsets = offsets.flatten()
    return not (offsets.dot(offsets).item() <= FAR**2 or offsets.abs().amax().item() <= FAR)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature up to a shift at each position: the largest is taken off first, so that the quotient rounds no offset."""
    return logits if temperature == 1.0 else (logits - logits.detach().amax(1, keepdim=True)) / temperature


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
    student: Tensor, teacher: Tensor, smoothed: Tensor, sums: Tensor, scale: Tensor, beta: float, temperature: float,
    break_asymmetry: bool,
) -> Tensor:  # fmt: skip
    """Values (b,) of rows by operations that autograd and torch.func follow to any order. Arguments as in ClosedForm."""
    mean = _mean(smoothed, (teacher - student).detach(), sums)
    student, teacher = _without_offsets(student, teacher, mean)
    likelihood = F.softmax(_tempered(teacher.detach(), temperature), dim=-1)
    entropy = -(likelihood * F.log_softmax(_tempered(student, temperature), dim=-1)).sum(-1)
    difference = teacher - (student if break_asymmetry else student.detach())
    deviation = difference - (smoothed * difference).sum(-1, keepdim=True) / sums.unsqueeze(-1)
    return beta * entropy + 0.5 * scale * (smoothed * deviation.square()).sum(-1)


@dataclass(frozen=True)
class SampleWise:
    """The sample-wise weights of Eq. 12, w = softmax(teacher / temperature), of logits (B, C) or (B, C, S)."""

    gamma: float
    temperature: float
    dtype: torch.dtype

    def __call__(self, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w^gamma, its sums over the classes, and w."""
        log_w = self._log(teacher)
        w = log_w.exp()
        smoothed = w if self.gamma == 1.0 else log_w.mul_(self.gamma).exp_()
        return smoothed, smoothed.sum(1), w

    def totals(self, teacher: Tensor) -> Tensor:
        """The sums alone."""
        return self._log(teacher).mul_(self.gamma).exp_().sum(1)

    def _log(self, teacher: Tensor) -> Tensor:
        return F.log_softmax(_tempered(teacher.to(self.dtype), self.temperature), dim=1)


def common_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """What the losses are computed in."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
