"""The closed form of GKL as two Triton kernels: each logit is read once in each direction, none is copied.

`gkl.losses.gkl` comes here by itself with logits on a GPU; the mathematics and the names are those of its eager form.
Half-precision logits are read as they are and computed in float32 registers. For backward a row leaves its sums only.

The forward kernel sweeps a row block by block and keeps running sums relative to the running maxima, as the online
softmax does; when a maximum moves, the sums move with it. Source of the merge of weighted means and squared
deviations: Chan, Golub and LeVeque, 1979.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# What a row leaves behind in statistics[:, row], in float32: max s, sum exp((s - max s) / T), the same two of t,
# and of d = (t - max t) - (s - max s) under the weights v its mean, W = sum v, sum v (d - mean)^2; the cross-entropy.
STATISTICS = 8
WIDEST = 4096  # classes that a program of the forward kernel holds at once, 16 for each thread
BELOW = tl.constexpr(-1e30)  # pads logits: below any of them, and finite so that 0 * BELOW is 0


@triton.jit
def _load(row, columns, classes, padding):
    """One block of a row in float32, with `padding` past the last class."""
    inside = columns < classes
    return tl.where(inside, tl.load(row + columns, mask=inside, other=0.0).to(tl.float32), padding)


@triton.jit
def _forward(
    student,  # (B, C) pointers
    teacher,
    smoothed,
    statistics,  # (STATISTICS, B), written
    student_stride,  # elements from row to row
    teacher_stride,
    smoothed_stride,
    batch,
    classes,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """One program for each row."""
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)  # torch.compile passes Python floats as float64
    row = tl.program_id(0).to(tl.int64)  # B * C may pass 2^31
    student += row * student_stride
    teacher += row * teacher_stride
    smoothed += row * smoothed_stride
    # Any entry is as good a first maximum as -inf, and brings no inf - inf.
    student_max = tl.load(student).to(tl.float32)
    teacher_max = tl.load(teacher).to(tl.float32)
    student_sum = 0.0  # sum exp((s - max s) / T)
    teacher_sum = 0.0
    product = 0.0  # sum exp((t - max t) / T) (s - max s)
    total = 0.0  # W = sum v
    mean = 0.0  # of d under v
    spread = 0.0  # sum v (d - mean)^2
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load(student, columns, classes, BELOW)
        t = _load(teacher, columns, classes, BELOW)
        v = _load(smoothed, columns, classes, 0.0)
        student_next = tl.maximum(student_max, tl.max(s, 0))
        teacher_next = tl.maximum(teacher_max, tl.max(t, 0))
        student_move = student_max - student_next
        teacher_move = teacher_max - teacher_next
        student_max = student_next
        teacher_max = teacher_next
        s -= student_max
        t -= teacher_max

        likelihood = tl.exp(t * inverse_temperature)
        shrink = tl.exp(teacher_move * inverse_temperature)
        product = shrink * (product + student_move * teacher_sum) + tl.sum(likelihood * s, 0)
        teacher_sum = shrink * teacher_sum + tl.sum(likelihood, 0)
        shrink = tl.exp(student_move * inverse_temperature)
        student_sum = shrink * student_sum + tl.sum(tl.exp(s * inverse_temperature), 0)

        d = t - s
        mean += teacher_move - student_move
        block_total = tl.sum(v, 0)
        block_mean = tl.div_rn(tl.sum(v * d, 0), tl.where(block_total == 0.0, 1.0, block_total))
        deviation = d - block_mean
        merged = total + block_total
        share = block_total / tl.where(merged == 0.0, 1.0, merged)
        ahead = block_mean - mean
        spread += tl.sum(v * deviation * deviation, 0) + ahead * ahead * total * share
        # Not mean + ahead * share: a row of one block keeps its own mean to the last digit.
        mean = (1.0 - share) * mean + share * block_mean
        total = merged

    cross_entropy = tl.log(student_sum) - product / teacher_sum * inverse_temperature
    statistics += row
    tl.store(statistics, student_max)
    tl.store(statistics + batch, student_sum)
    tl.store(statistics + 2 * batch, teacher_max)
    tl.store(statistics + 3 * batch, teacher_sum)
    tl.store(statistics + 4 * batch, mean)
    tl.store(statistics + 5 * batch, total)
    tl.store(statistics + 6 * batch, spread)
    tl.store(statistics + 7 * batch, cross_entropy)


@triton.jit
def _backward(
    student,  # (B, C) pointers
    teacher,
    smoothed,
    statistics,  # (STATISTICS, B)
    scale,  # (B,) of half the spread
    grad,  # (B,)
    to_student,  # (B, C) written row by row, or None
    to_teacher,
    student_stride,
    teacher_stride,
    smoothed_stride,
    grad_stride,
    batch,
    classes,
    inverse_temperature,
    entropy_scale,  # beta / T
    break_asymmetry: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each block of each row."""
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    entropy_scale = tl.cast(entropy_scale, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < classes
    statistics += row
    grad = tl.load(grad + row * grad_stride).to(tl.float32)
    s = _load(student + row * student_stride, columns, classes, BELOW) - tl.load(statistics)
    t = _load(teacher + row * teacher_stride, columns, classes, BELOW) - tl.load(statistics + 2 * batch)
    v = _load(smoothed + row * smoothed_stride, columns, classes, 0.0)
    pull = v * (t - s - tl.load(statistics + 4 * batch)) * (grad * tl.load(scale + row))
    if to_teacher is not None:
        tl.store(to_teacher + row * classes + columns, pull, mask=inside)
    if to_student is not None:
        # The sums divide: their logarithms, taken into the exponents, would cost a digit. A plain / on a GPU may be
        # two units in the last place away; div_rn, once for each row, is not.
        student_factor = tl.div_rn(grad * entropy_scale, tl.load(statistics + batch))
        teacher_factor = tl.div_rn(grad * entropy_scale, tl.load(statistics + 3 * batch))
        gradient = tl.exp(s * inverse_temperature) * student_factor
        gradient -= tl.exp(t * inverse_temperature) * teacher_factor
        if break_asymmetry:
            gradient -= pull
        tl.store(to_student + row * classes + columns, gradient, mask=inside)


class TritonClosedForm(torch.autograd.Function):
    """(B,) values of alpha * wMSE + beta * CE: arguments, values and gradients of the eager closed form.

    All tensors on one GPU, in any dtype but float64. Gradients have their logits' dtype.
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
        """Values, in one sweep over each row, which finds sums and teacher_probs whether they are known or not."""
        student, teacher, smoothed = (
            x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher, smoothed)
        )
        batch, classes = student.shape
        statistics = torch.empty(STATISTICS, batch, dtype=torch.float32, device=student.device)
        block = min(triton.next_power_of_2(classes), WIDEST)
        with torch.cuda.device(student.get_device()):
            _forward[(batch,)](
                student, teacher, smoothed, statistics,
                student.stride(0), teacher.stride(0), smoothed.stride(0), batch, classes, 1.0 / temperature,
                BLOCK=block, num_warps=max(1, min(8, block // 256)),
            )  # fmt: skip
        spread, cross_entropy = statistics[6:]
        scale = scale.float()
        ctx.save_for_backward(student, teacher, smoothed, statistics, scale)
        ctx.beta, ctx.temperature, ctx.break_asymmetry = beta, temperature, break_asymmetry
        return (beta * cross_entropy).addcmul_(scale, spread, value=0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients, from the logits anew and the statistics."""
        student, teacher, smoothed, statistics, scale = ctx.saved_tensors
        batch, classes = student.shape
        to_student, to_teacher = (
            torch.empty(batch, classes, dtype=x.dtype, device=x.device) if wanted else None
            for x, wanted in zip((student, teacher), ctx.needs_input_grad, strict=False)
        )
        block = min(triton.next_power_of_2(classes), 1024)
        with torch.cuda.device(student.get_device()):
            _backward[(batch, triton.cdiv(classes, block))](
                student, teacher, smoothed, statistics, scale, grad, to_student, to_teacher,
                student.stride(0), teacher.stride(0), smoothed.stride(0), grad.stride(0), batch, classes,
                1.0 / ctx.temperature, ctx.beta / ctx.temperature,
                break_asymmetry=ctx.break_asymmetry, BLOCK=block, num_warps=max(1, min(4, block // 256)),
            )  # fmt: skip
        return to_student, to_teacher, None, None, None, None, None, None, None
