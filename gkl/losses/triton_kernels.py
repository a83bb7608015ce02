"""GKL as two Triton kernels, one in each direction: each reads a logit once, backward writes its gradient, no logit is copied.

`gkl.losses.gkl` comes here by itself with logits on a GPU; the mathematics and the names are those of its eager form.
Half-precision logits are read as they are and computed in float32 registers. For backward a row leaves its sums only.
Weights are rows of a tensor, rows of a table gathered by label, or the teacher's own, formed on the way. The batch's
mean pair weight and the mean loss are the last program's to finish, so forward is one launch, and backward another.

The forward kernel sweeps its rows block by block and keeps running sums relative to the running maxima, as the online
softmax does; when a maximum moves, the sums move with it. Source of the merge of weighted means and squared
deviations: Chan, Golub and LeVeque, 1979.

One file, since the kernels of the two directions and what launches them must agree line by line.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gkl.losses.closed_form import PairWeight
from gkl.losses.gradients import first_derivative
from gkl.losses.inputs import checked_settings

# What a row leaves behind in statistics[:, row], in float32: max s, sum exp((s - max s) / T), the same two of t; of
# d = (t - max t) - (s - max s) the mean under the weights; what multiplies v (d - mean) in wMSE's gradient, but for the
# pair weight; W^2; and alpha * wMSE, but for the pair weight, and beta * cross-entropy, which make its value.
STATISTICS = tl.constexpr(9)
PARTIALS = tl.constexpr(
    3
)  # of the last three a program's sums, which lie behind them and the batch's pair weight
WIDEST = 4096  # classes that a program of the forward kernel holds at once, 16 for each thread
TILE = 1024  # entries that a program holds at least, of as many rows as that takes
BELOW = tl.constexpr(-1e30)  # pads logits: below any of them, and finite so that 0 * BELOW is 0
LAST = tl.constexpr(2048)  # rows or programs that the last program takes at once


@triton.jit
def _load(rows, columns, inside, padding):
    """One block of rows in float32, with `padding` past the last class."""
    return tl.where(
        inside[None, :],
        tl.load(rows[:, None] + columns[None, :], mask=inside[None, :], other=0.0).to(tl.float32),
        padding,
    )


@triton.jit
def _chosen(labels, rows, classes):
    """Which rows of the weights, and what multiplies them: 1, or NaN for a label that is no class."""
    known = tl.full(rows.shape, 1.0, tl.float32)
    if labels is not None:
        rows = tl.load(labels + rows).to(tl.int64)
        valid = (rows >= 0) & (rows < classes)
        known = tl.where(valid, 1.0, float("nan"))
        rows = tl.where(valid, rows, 0)
    return rows, known


@triton.jit
def _smoothed(weights, known, t, columns, inside, gamma, weights_inverse, power: tl.constexpr):
    """v = w ** gamma of one block; of the teacher's own weights (None) relative to the largest."""
    if weights is None:
        v = tl.exp(t * (gamma * weights_inverse))
    else:
        v = _load(weights, columns, inside, 0.0) * known[:, None]
        if power:
            v = tl.where(v == 0.0, tl.where(gamma == 0.0, 1.0, 0.0), tl.exp(gamma * tl.log(v)))
    return tl.where(inside[None, :], v, 0.0)


@triton.jit
def _to_minus(x, gamma):
    """x ** -gamma of x >= 1. The power of two in x is taken out: a logarithm of 10 alone would cost four bits."""
    exponent = tl.floor(tl.log2(x))
    high = gamma * exponent
    low = tl.fma(gamma, exponent, -high) * 0.6931471805599453
    return tl.exp2(-high) * tl.exp(-gamma * tl.log(x * tl.exp2(-exponent)) - low)


@triton.jit
def _forward(
    student,  # (B, C) pointers
    teacher,
    weights,  # (B, C), or a table (C, C) where there are labels (B,); None for the teacher's own
    labels,
    statistics,  # written: (STATISTICS, B), the pair weight, (PARTIALS, programs)
    counter,  # 0, and again when the last program is done
    value,  # (B,) or (), written where `finish`
    student_stride,  # elements from row to row
    teacher_stride,
    weights_stride,
    batch,
    classes,
    alpha,
    beta,
    gamma,
    inverse_temperature,
    weights_inverse,  # 1 / the temperature of the teacher's own weights
    power: tl.constexpr,  # whether the weights still want their exponent
    finish: tl.constexpr,
    own: tl.constexpr,  # whether the pair weight is this batch's mean W^2; else 1
    mean_alone: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each ROWS rows."""
    # Typed here, since torch.compile passes Python floats as float64.
    alpha = tl.cast(alpha, tl.float32)
    beta = tl.cast(beta, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    weights_inverse = tl.cast(weights_inverse, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # B * C may pass 2^31
    present = rows < batch
    rows = tl.minimum(rows, batch - 1)
    student += rows * student_stride
    teacher += rows * teacher_stride
    chosen, known = _chosen(labels, rows, classes)
    if weights is not None:
        weights += chosen * weights_stride
    # Any entry is as good a first maximum as -inf, and brings no inf - inf.
    student_max = tl.load(student).to(tl.float32)
    teacher_max = tl.load(teacher).to(tl.float32)
    student_sum = tl.zeros([ROWS], tl.float32)  # sum exp((s - max s) / T)
    teacher_sum = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)  # sum exp((t - max t) / T) (s - max s)
    whole = tl.zeros([ROWS], tl.float32)  # of the teacher's own weights sum w / max w
    total = tl.zeros([ROWS], tl.float32)  # sum v
    mean = tl.zeros([ROWS], tl.float32)  # of d under v
    spread = tl.zeros([ROWS], tl.float32)  # sum v (d - mean)^2
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        s = _load(student, columns, inside, BELOW)
        t = _load(teacher, columns, inside, BELOW)
        student_next = tl.maximum(student_max, tl.max(s, 1))
        teacher_next = tl.maximum(teacher_max, tl.max(t, 1))
        student_move = student_max - student_next
        teacher_move = teacher_max - teacher_next
        student_max = student_next
        teacher_max = teacher_next
        s -= student_max[:, None]
        t -= teacher_max[:, None]

        likelihood = tl.exp(t * inverse_temperature)
        shrink = tl.exp(teacher_move * inverse_temperature)
        product = shrink * (product + student_move * teacher_sum) + tl.sum(likelihood * s, 1)
        teacher_sum = shrink * teacher_sum + tl.sum(likelihood, 1)
        shrink = tl.exp(student_move * inverse_temperature)
        student_sum = shrink * student_sum + tl.sum(tl.exp(s * inverse_temperature), 1)

        v = _smoothed(weights, known, t, columns, inside, gamma, weights_inverse, power)
        if weights is None:
            shrink = tl.exp(teacher_move * weights_inverse)
            whole = shrink * whole + tl.sum(tl.exp(t * weights_inverse), 1)
            shrink = tl.exp(teacher_move * (gamma * weights_inverse))
            total *= shrink
            spread *= shrink
        d = t - s
        mean += teacher_move - student_move
        block_total = tl.sum(v, 1)
        block_mean = tl.div_rn(tl.sum(v * d, 1), tl.where(block_total == 0.0, 1.0, block_total))
        deviation = d - block_mean[:, None]
        merged = total + block_total
        share = block_total / tl.where(merged == 0.0, 1.0, merged)
        ahead = block_mean - mean
        spread += tl.sum(v * deviation * deviation, 1) + ahead * ahead * total * share
        # Not mean + ahead * share: a row of one block keeps its own mean to the last digit.
        mean = (1.0 - share) * mean + share * block_mean
        total = merged

    unit = tl.full([ROWS], 1.0, tl.float32)  # of v
    if weights is None:
        unit = _to_minus(whole, gamma)
    total *= unit  # W
    pull_scale = alpha * total * unit
    squares = total * total
    wmse = 0.5 * pull_scale * spread
    entropy = beta * (tl.log(student_sum) - product / teacher_sum * inverse_temperature)
    row = statistics + rows
    tl.store(row, student_max, mask=present)
    tl.store(row + batch, student_sum, mask=present)
    tl.store(row + 2 * batch, teacher_max, mask=present)
    tl.store(row + 3 * batch, teacher_sum, mask=present)
    tl.store(row + 4 * batch, mean, mask=present)
    tl.store(row + 5 * batch, pull_scale, mask=present)
    tl.store(row + 6 * batch, squares, mask=present)
    tl.store(row + 7 * batch, wmse, mask=present)
    tl.store(row + 8 * batch, entropy, mask=present)
    if finish:
        programs = tl.num_programs(0)
        partial = statistics + STATISTICS * batch + 1 + tl.program_id(0)
        tl.store(partial, tl.sum(tl.where(present, squares, 0.0), 0))
        tl.store(partial + programs, tl.sum(tl.where(present, wmse, 0.0), 0))
        tl.store(partial + 2 * programs, tl.sum(tl.where(present, entropy, 0.0), 0))
        tl.debug_barrier()  # what any thread wrote is written before the program counts as done
        if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
            _last(statistics, value, batch, programs, own, mean_alone)
            tl.store(counter, 0)


@triton.jit
def _added(partials, programs):
    """Sum of one number of every program, in an order that does not depend on who came when."""
    added = tl.zeros([LAST], tl.float32)
    for start in range(0, programs, LAST):
        each = start + tl.arange(0, LAST)
        added += tl.load(partials + each, mask=each < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(added, 0)


@triton.jit
def _last(statistics, value, batch, programs, own: tl.constexpr, mean_alone: tl.constexpr):
    """The pair weight from all programs' W^2, and with it the values or their mean. Past the first-level caches (.cg)."""
    pair_weight = statistics + STATISTICS * batch
    partials = pair_weight + 1
    divisor = 1.0
    if own:
        divisor = tl.div_rn(_added(partials, programs), tl.cast(batch, tl.float32))
    tl.store(pair_weight, divisor)
    if mean_alone:
        wmse = _added(partials + programs, programs) / divisor
        tl.store(value, (wmse + _added(partials + 2 * programs, programs)) / batch)
    else:
        for start in range(0, batch, LAST):
            rows = start + tl.arange(0, LAST)
            wmse = tl.load(statistics + 7 * batch + rows, mask=rows < batch, cache_modifier=".cg")
            entropy = tl.load(statistics + 8 * batch + rows, mask=rows < batch, cache_modifier=".cg")
            tl.store(value + rows, wmse / divisor + entropy, mask=rows < batch)


@triton.jit
def _backward(
    student,  # (B, C) pointers
    teacher,
    weights,
    labels,
    statistics,
    pair_weight,  # (B,) or ()
    grad,  # (B,) or (), of the mean
    to_student,  # (B, C) written row by row, or None
    to_teacher,
    student_stride,
    teacher_stride,
    weights_stride,
    pair_weight_stride,
    grad_stride,
    batch,
    classes,
    gamma,
    inverse_temperature,
    weights_inverse,
    entropy_scale,  # beta / T
    power: tl.constexpr,
    mean_alone: tl.constexpr,
    break_asymmetry: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each block of ROWS rows."""
    gamma = tl.cast(gamma, tl.float32)
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    weights_inverse = tl.cast(weights_inverse, tl.float32)
    entropy_scale = tl.cast(entropy_scale, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < classes
    stored = (rows < batch)[:, None] & inside[None, :]
    rows = tl.minimum(rows, batch - 1)
    chosen, known = _chosen(labels, rows, classes)
    if weights is not None:
        weights += chosen * weights_stride
    row = statistics + rows
    grad = tl.load(grad + rows * grad_stride).to(tl.float32)
    if mean_alone:
        grad = grad / batch
    s = _load(student + rows * student_stride, columns, inside, BELOW) - tl.load(row)[:, None]
    t = _load(teacher + rows * teacher_stride, columns, inside, BELOW) - tl.load(row + 2 * batch)[:, None]
    v = _smoothed(weights, known, t, columns, inside, gamma, weights_inverse, power)
    divisor = tl.load(pair_weight + rows * pair_weight_stride).to(tl.float32)
    pull_scale = tl.div_rn(grad * tl.load(row + 5 * batch), divisor)
    pull = v * (t - s - tl.load(row + 4 * batch)[:, None]) * pull_scale[:, None]
    places = rows[:, None] * classes + columns[None, :]
    if to_teacher is not None:
        tl.store(to_teacher + places, pull, mask=stored)
    if to_student is not None:
        # The sums divide: their logarithms, taken into the exponents, would cost a digit. A plain / on a GPU may be
        # two units in the last place away; div_rn, once for each row, is not.
        student_factor = tl.div_rn(grad * entropy_scale, tl.load(row + batch))
        teacher_factor = tl.div_rn(grad * entropy_scale, tl.load(row + 3 * batch))
        gradient = tl.exp(s * inverse_temperature) * student_factor[:, None]
        gradient -= tl.exp(t * inverse_temperature) * teacher_factor[:, None]
        if break_asymmetry:
            gradient -= pull
        tl.store(to_student + places, gradient, mask=stored)


class TritonGKL(torch.autograd.Function):
    """alpha * wMSE + beta * CE, (B,) or its mean (): values and gradients of the eager closed form.

    All tensors on one GPU, logits in any dtype but float64. Gradients have their logits' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor | None,
        labels: Tensor | None,
        counted: Tensor | None,
        alpha: float,
        beta: float,
        gamma: float,
        temperature: float,
        weights_temperature: float,
        pair_weight: PairWeight,
        break_asymmetry: bool,
        mean_alone: bool,
        power: bool,
    ) -> Tensor:
        """Values, in one sweep over each row. With labels the weights are a table. power: whether they still want their exponent.

        counted: (B,), whose gradients are not zero; their values alone mean something, and not with mean_alone.
        """
        student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
        if weights is not None and weights.stride(1) != 1:
            weights = weights.contiguous()
        own = pair_weight is None
        if isinstance(pair_weight, float | int):
            alpha, pair_weight = alpha / pair_weight, None
        finish = pair_weight is None
        launch = torch.ops.gkl.closed_form if torch.compiler.is_compiling() else _launch_forward
        scalars = beta, gamma, temperature, weights_temperature
        statistics, value = launch(
            student, teacher, weights, labels, alpha, *scalars, power, finish, own, mean_alone
        )
        if pair_weight is not None:
            batch = student.shape[0]
            squares, wmse, entropy = statistics[6 * batch : 9 * batch].view(3, batch)
            pair_weight = pair_weight(squares) if callable(pair_weight) else pair_weight
            checked_settings(pair_weight=pair_weight)
            value = torch.addcdiv(entropy, wmse, pair_weight)
            value = value.mean() if mean_alone else value
        ctx.save_for_backward(student, teacher, weights, labels, statistics, pair_weight, counted)
        ctx.scalars, ctx.switches = scalars, (power, mean_alone, break_asymmetry)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients, from the logits anew and the statistics."""
        wanted = ctx.needs_input_grad[:2]
        *saved, counted = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()  # such a graph holds the logits and refuses by itself
        grad = grad if compiling else first_derivative(grad)
        launch: Any = torch.ops.gkl.closed_form_backward if compiling else _launch_backward
        # is_grads_batched: a kernel takes one of them.
        several = not compiling and torch._C._functorch.is_legacy_batchedtensor(grad)
        one = torch.ones(grad.shape, device=saved[0].device) if several else grad
        gradients = launch(*saved, one, *ctx.scalars, *ctx.switches, *wanted)
        if counted is not None:
            gradients = [
                g.masked_fill_(~counted[:, None], 0.0) if w else g
                for g, w in zip(gradients, wanted, strict=True)
            ]
        if several:
            gradients = [(g * grad.unsqueeze(-1)).to(g.dtype) for g in gradients]
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 12


def _sizes(student: Tensor) -> tuple[int, int, int]:
    """BLOCK, ROWS and the programs of the forward kernel."""
    block = _width(student.shape[1], WIDEST)
    rows = max(1, TILE // block)
    return block, rows, triton.cdiv(student.shape[0], rows)


def _made(student: Tensor, mean_alone: bool) -> tuple[Tensor, Tensor]:
    """Statistics and value, not written yet."""
    batch, programs = student.shape[0], _sizes(student)[2]
    size = STATISTICS.value * batch + 1 + PARTIALS.value * programs
    statistics = torch.empty(size, dtype=torch.float32, device=student.device)
    return statistics, torch.empty(() if mean_alone else batch, dtype=torch.float32, device=student.device)


def _launch_forward(
    student: Tensor, teacher: Tensor, weights: Tensor | None, labels: Tensor | None, alpha: float, beta: float, gamma: float,
    temperature: float, weights_temperature: float, power: bool, finish: bool, own: bool, mean_alone: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (block, rows, programs), (batch, classes) = _sizes(student), student.shape
    statistics, value = _made(student, mean_alone)
    with torch.cuda.device(student.get_device()):
        _forward[(programs,)](
            student, teacher, weights, labels, statistics, _counter(student.device) if finish else None, value,
            student.stride(0), teacher.stride(0), 0 if weights is None else weights.stride(0), batch, classes,
            alpha, beta, gamma, 1.0 / temperature, 1.0 / weights_temperature,
            power=power and weights is not None, finish=finish, own=own, mean_alone=mean_alone,
            ROWS=rows, BLOCK=block, num_warps=4 if block <= TILE else 8,
        )  # fmt: skip
    return statistics, value


def _launch_backward(
    student: Tensor, teacher: Tensor, weights: Tensor | None, labels: Tensor | None, statistics: Tensor,
    pair_weight: Tensor | None, grad: Tensor, beta: float, gamma: float, temperature: float, weights_temperature: float,
    power: bool, mean_alone: bool, break_asymmetry: bool, to_student: bool, to_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, classes = student.shape
    gradients = _made_gradients(student, teacher, to_student, to_teacher)
    pair_weight = statistics[STATISTICS.value * batch] if pair_weight is None else pair_weight
    block = _width(classes, TILE)
    rows = TILE // block
    with torch.cuda.device(student.get_device()):
        _backward[(triton.cdiv(batch, rows), triton.cdiv(classes, block))](
            student, teacher, weights, labels, statistics, pair_weight, grad,
            gradients[0] if to_student else None, gradients[1] if to_teacher else None,
            student.stride(0), teacher.stride(0), 0 if weights is None else weights.stride(0),
            pair_weight.stride(0) if pair_weight.ndim else 0, grad.stride(0) if grad.ndim else 0, batch, classes,
            gamma, 1.0 / temperature, 1.0 / weights_temperature, beta / temperature,
            power=power and weights is not None, mean_alone=mean_alone,
            break_asymmetry=break_asymmetry, ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return gradients


def _made_gradients(
    student: Tensor, teacher: Tensor, to_student: bool, to_teacher: bool
) -> tuple[Tensor, Tensor]:
    """One tensor for each gradient, not written yet; an empty one where none is wanted."""
    batch, classes = student.shape
    return (
        student.new_empty((batch, classes) if to_student else (0,)),
        teacher.new_empty((batch, classes) if to_teacher else (0,)),
    )


# torch.compile takes the launches whole: which arguments a kernel writes is said here, and not guessed from its code.
torch.library.custom_op("gkl::closed_form", _launch_forward, mutates_args=())
torch.library.custom_op("gkl::closed_form_backward", _launch_backward, mutates_args=())


@torch.library.register_fake("gkl::closed_form")
def _(student: Any, teacher: Any, weights: Any, labels: Any, *scalars: Any) -> tuple[Tensor, Tensor]:
    return _made(student, scalars[-1])


@torch.library.register_fake("gkl::closed_form_backward")
def _(student: Any, teacher: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    return _made_gradients(student, teacher, *rest[-2:])


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """A zero that the kernel leaves as zero: one for each stream, since what two streams run may run at once."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)  # a graph may be replayed beside anything
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


def _width(classes: int, widest: int) -> int:
    """The power of two that holds the classes, up to the widest; found so that torch.compile's dynamic ones stay dynamic."""
    width = 16
    while width < classes and width < widest:
        width *= 2
    return width
