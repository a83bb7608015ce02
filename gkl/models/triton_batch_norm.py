# mypy: allow-untyped-defs, allow-incomplete-defs
"""Batch norm and the activation behind it as Triton kernels, for channels_last maps in groups along the batch.

`gkl.models.batch_norm.GhostBatchNorm2d` comes here by itself with maps on a GPU. All groups share a launch. Counted in
passes over the map: statistics read it once, the rest reads it once and writes once; backward reads map and gradient twice (once
in eval mode) and writes once. The activation's input is computed anew in backward, so that only the map itself is kept.

A channels_last map is a matrix: a row for each pixel of each picture, a column for each channel; a group is a band of rows. A
program takes a block of columns of one group, and of its tiles of BLOCK_R rows every `splits`-th. What programs find
is merged by a kernel of its own, in one order whatever runs first: the same bits each time, and on every card.

Moments are those of values relative to the group's first row, and a mean is two floats, what the first cannot hold in the
second: no digit is lost where the mean is large beside the deviation. Each lane keeps a running mean and squared deviations.
Source of their merge: Chan, Golub and LeVeque, 1979.

One file, since the kernels of the two directions and what launches them must agree line by line.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096  # elements that a program holds at once, 16 for each of its threads
WARPS = 8
REDUCING = 528  # programs of a reduction, 4 for each multiprocessor of an H100: one wave
MAPPING = 2112  # programs of a pass that writes the map
MOST_SPLITS = 512


@triton.jit
def _held(count, split, splits, BLOCK_R: tl.constexpr):
    """Tiles of a group of `count` rows that program `split` takes: split, split + splits, ..."""
    return tl.maximum(tl.cdiv(count, BLOCK_R) - split + splits - 1, 0) // splits


@triton.jit
def _rows_held(count, split, splits, BLOCK_R: tl.constexpr):
    """Rows in these tiles, in float32; the group's last tile may be cut short."""
    held = _held(count, split, splits, BLOCK_R)
    last = split + (held - 1) * splits
    short = (held > 0) & ((last + 1) * BLOCK_R > count)
    return (held * BLOCK_R - tl.where(short, (last + 1) * BLOCK_R - count, 0)).to(tl.float32)


@triton.jit
def _channels(mean, rest, spread, column, inside, eps, BY_BATCH: tl.constexpr):
    """Of each channel what is taken off a value, in two parts, and 1 / deviation.

    BY_BATCH: a group's rows of group_statistics; else the running mean and variance.
    """
    mean = tl.load(mean + column, mask=inside, other=0.0)
    spread = tl.load(spread + column, mask=inside, other=1.0)
    if BY_BATCH:
        rest = tl.load(rest + column, mask=inside, other=0.0)
    else:
        rest = tl.zeros_like(mean)
        spread = tl.div_rn(1.0, tl.sqrt_rn(spread + tl.cast(eps, tl.float32)))
    return mean, rest, spread


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        y = tl.where(y < 0.0, 0.0, y)  # nan stays nan
    if ACTIVATION == 2:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _through_activation(grad, y, ACTIVATION: tl.constexpr):
    """The gradient to the activation's input y."""
    if ACTIVATION == 1:
        grad = tl.where(y <= 0.0, 0.0, grad)
    if ACTIVATION == 2:
        share = tl.sigmoid(y)
        grad = grad * share * (1.0 + y * (1.0 - share))
    return grad


@triton.jit
def _moments(
    x,  # (rows, channels)
    found,  # (2, splits, groups, channels) written: means relative to the group's first row, squared deviations
    rows,
    group_rows,  # in each group but the last
    channels,
    groups,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    group = tl.program_id(1)
    split = tl.program_id(2)
    first = group.to(tl.int64) * group_rows
    count = tl.minimum(rows - first, group_rows).to(tl.int32)
    x += first * channels
    line = tl.arange(0, BLOCK_R)
    within = line[:, None] * channels + column[None, :]
    origin = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    mean = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    held = _held(count, split, splits, BLOCK_R)
    for number in range(held):
        start = (split + number * splits) * BLOCK_R
        valid = (start + line < count)[:, None] & inside[None, :]
        value = tl.load(x + start.to(tl.int64) * channels + within, mask=valid, other=0.0).to(tl.float32)
        ahead = tl.where(valid, value - origin - mean, 0.0)
        share = 1.0 / tl.cast(number + 1, tl.float32)
        mean += ahead * share
        squares += ahead * ahead * (1.0 - share)
    # A lane past the end of a tile cut short, which is the last one held, has a value less.
    last = (split + (held - 1) * splits) * BLOCK_R
    seen = tl.where(held > 0, held - tl.where(last + line < count, 0, 1), 0).to(tl.float32)[:, None]
    total = _rows_held(count, split, splits, BLOCK_R)
    merged = tl.sum(mean * seen, 0) / tl.maximum(total, 1.0)
    apart = mean - merged[None, :]
    found += (split * groups + group) * channels + column
    tl.store(found, merged, mask=inside)
    tl.store(found + splits * groups * channels, tl.sum(squares + seen * apart * apart, 0), mask=inside)


@triton.jit
def _statistics(
    x,
    found,  # as _moments leaves it
    statistics,  # (3, groups, channels) written: the mean in two parts, and 1 / deviation
    running_mean,  # (channels), renewed from the first group where TRACKED
    running_var,
    batches,  # (), one more where TRACKED
    rows,
    group_rows,
    channels,
    groups,
    splits,
    eps,
    momentum,
    TRACKED: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of _moments
    BLOCK_S: tl.constexpr,  # at least splits
    BLOCK_C: tl.constexpr,
):
    eps = tl.cast(eps, tl.float32)  # torch.compile passes Python floats as float64
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    group = tl.program_id(1)
    first = group.to(tl.int64) * group_rows
    count = tl.minimum(rows - first, group_rows).to(tl.int32)
    split = tl.arange(0, BLOCK_S)
    held = tl.where(split < splits, _rows_held(count, split, splits, BLOCK_R), 0.0)[:, None]
    valid = (split < splits)[:, None] & inside[None, :]
    at = found + (split[:, None] * groups + group) * channels + column[None, :]
    means = tl.load(at, mask=valid, other=0.0)
    squares = tl.load(at + splits * groups * channels, mask=valid, other=0.0)
    total = count.to(tl.float32)
    mean = tl.div_rn(tl.sum(means * held, 0), total)
    apart = means - mean[None, :]
    squares = tl.sum(squares + held * apart * apart, 0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, total) + eps))
    origin = tl.load(x + first * channels + column, mask=inside, other=0.0).to(tl.float32)
    whole = origin + mean
    added = whole - origin
    rest = (origin - (whole - added)) + (mean - added)
    statistics += group * channels + column
    tl.store(statistics, whole, mask=inside)
    tl.store(statistics + groups * channels, rest, mask=inside)
    tl.store(statistics + 2 * groups * channels, inverse, mask=inside)
    if TRACKED:
        share = tl.cast(momentum, tl.float32)
        renewed = inside & (group == 0)
        before = tl.load(running_mean + column, mask=renewed, other=0.0)
        tl.store(running_mean + column, share * whole + (1.0 - share) * before, mask=renewed)
        variance = tl.div_rn(squares, total - 1.0)
        before = tl.load(running_var + column, mask=renewed, other=0.0)
        tl.store(running_var + column, share * variance + (1.0 - share) * before, mask=renewed)
        tl.store(batches, tl.load(batches) + 1, mask=(group == 0) & (tl.program_id(0) == 0))


@triton.jit
def _normalise(
    x,  # (rows, channels)
    y,  # the same, written
    mean,  # (groups, channels) of statistics where BY_BATCH, else the (channels) running ones
    rest,
    spread,
    weight,  # (channels)
    bias,
    rows,
    group_rows,
    channels,
    splits,
    eps,
    BY_BATCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    group = tl.program_id(1)
    split = tl.program_id(2)
    first = group.to(tl.int64) * group_rows
    count = tl.minimum(rows - first, group_rows).to(tl.int32)
    x += first * channels
    y += first * channels
    here = group * channels + column
    middle, rest, inverse = _channels(mean, rest, spread, here, inside, eps, BY_BATCH)
    scale = inverse * tl.load(weight + column, mask=inside, other=0.0)
    shift = tl.load(bias + column, mask=inside, other=0.0) - rest * scale
    line = tl.arange(0, BLOCK_R)
    within = line[:, None] * channels + column[None, :]
    tiles = tl.cdiv(count, BLOCK_R)
    for number in range(_held(count, split, splits, BLOCK_R)):
        start = (tiles - 1 - split - number * splits) * BLOCK_R  # what was read last is still in the cache
        valid = (start + line < count)[:, None] & inside[None, :]
        at = start.to(tl.int64) * channels + within
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) - middle[None, :]
        tl.store(y + at, _activated(value * scale[None, :] + shift[None, :], ACTIVATION), mask=valid)


@triton.jit
def _slopes(
    x,  # (rows, channels)
    grad,
    mean,  # as in _normalise
    rest,
    spread,
    weight,
    bias,
    found,  # (2, splits, groups, channels) written: sum g, sum g (x - mean), g the gradient to the activation's input
    rows,
    group_rows,
    channels,
    groups,
    splits,
    eps,
    BY_BATCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    group = tl.program_id(1)
    split = tl.program_id(2)
    first = group.to(tl.int64) * group_rows
    count = tl.minimum(rows - first, group_rows).to(tl.int32)
    x += first * channels
    grad += first * channels
    here = group * channels + column
    middle, rest, inverse = _channels(mean, rest, spread, here, inside, eps, BY_BATCH)
    scale = inverse * tl.load(weight + column, mask=inside, other=0.0)
    shift = tl.load(bias + column, mask=inside, other=0.0) - rest * scale
    line = tl.arange(0, BLOCK_R)
    within = line[:, None] * channels + column[None, :]
    plain = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    product = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for number in range(_held(count, split, splits, BLOCK_R)):
        start = (split + number * splits) * BLOCK_R
        valid = (start + line < count)[:, None] & inside[None, :]
        at = start.to(tl.int64) * channels + within
        g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) - middle[None, :]
        g = _through_activation(g, value * scale[None, :] + shift[None, :], ACTIVATION)
        plain += g
        product += g * value  # 0 past the end, where g is 0
    found += (split * groups + group) * channels + column
    total = tl.sum(plain, 0)
    tl.store(found, total, mask=inside)
    tl.store(found + splits * groups * channels, tl.sum(product, 0) - rest * total, mask=inside)


@triton.jit
def _sums(
    found,  # as _slopes leaves it
    sums,  # (2, groups, channels) written: each group's share of the gradient to the bias, and to the weight
    spread,  # as in _normalise
    channels,
    groups,
    splits,
    eps,
    BY_BATCH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    group = tl.program_id(1)
    here = group * channels + column
    _, _, inverse = _channels(spread, spread, spread, here, inside, eps, BY_BATCH)
    split = tl.arange(0, BLOCK_S)
    valid = (split < splits)[:, None] & inside[None, :]
    at = found + (split[:, None] * groups + group) * channels + column[None, :]
    sums += group * channels + column
    tl.store(sums, tl.sum(tl.load(at, mask=valid, other=0.0), 0), mask=inside)
    product = tl.sum(tl.load(at + splits * groups * channels, mask=valid, other=0.0), 0)
    tl.store(sums + groups * channels, product * inverse, mask=inside)


@triton.jit
def _gradient(
    x,  # (rows, channels)
    grad,
    to_x,  # written
    mean,  # as in _normalise
    rest,
    spread,
    weight,
    bias,
    sums,  # as _sums leaves it, read where BY_BATCH
    rows,
    group_rows,
    channels,
    groups,
    splits,
    eps,
    BY_BATCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    group = tl.program_id(1)
    split = tl.program_id(2)
    first = group.to(tl.int64) * group_rows
    count = tl.minimum(rows - first, group_rows).to(tl.int32)
    x += first * channels
    grad += first * channels
    to_x += first * channels
    here = group * channels + column
    middle, rest, inverse = _channels(mean, rest, spread, here, inside, eps, BY_BATCH)
    scale = inverse * tl.load(weight + column, mask=inside, other=0.0)
    shift = tl.load(bias + column, mask=inside, other=0.0) - rest * scale
    level = tl.zeros_like(scale)  # what the mean's and the deviation's own gradients take off
    slope = tl.zeros_like(scale)
    if BY_BATCH:
        sums += group * channels + column
        share = scale / count.to(tl.float32)
        level = tl.load(sums, mask=inside, other=0.0) * share
        slope = tl.load(sums + groups * channels, mask=inside, other=0.0) * inverse * share
        level -= slope * rest
    line = tl.arange(0, BLOCK_R)
    within = line[:, None] * channels + column[None, :]
    tiles = tl.cdiv(count, BLOCK_R)
    for number in range(_held(count, split, splits, BLOCK_R)):
        start = (tiles - 1 - split - number * splits) * BLOCK_R
        valid = (start + line < count)[:, None] & inside[None, :]
        at = start.to(tl.int64) * channels + within
        g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        if BY_BATCH or ACTIVATION != 0:
            value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) - middle[None, :]
            g = _through_activation(g, value * scale[None, :] + shift[None, :], ACTIVATION)
            g = g * scale[None, :]
            if BY_BATCH:
                g = g - level[None, :] - value * slope[None, :]
        else:
            g = g * scale[None, :]
        tl.store(to_x + at, g, mask=valid)


def _block_c(channels: int) -> int:
    """Columns of a tile: a power of two that divides the channels, if one of 16 to 128 does."""
    whole = channels & -channels
    return min(whole, 128) if whole >= 16 else min(triton.next_power_of_2(channels), 64)


def _tiling(x: Tensor, images: int, programs: int) -> tuple[tuple[int, int, int], dict[str, int], int]:
    """The grid (blocks of columns, groups, splits), the blocks' sizes, and the rows of a group of `images` pictures."""
    batch, channels, height, width = x.shape
    group_rows = images * height * width
    groups = triton.cdiv(batch, images)
    block_c = _block_c(channels)
    block_r = TILE // block_c
    across = triton.cdiv(channels, block_c) * groups
    splits = max(1, min(triton.cdiv(group_rows, block_r), programs // across, MOST_SPLITS))
    return (
        (triton.cdiv(channels, block_c), groups, splits),
        {"BLOCK_R": block_r, "BLOCK_C": block_c},
        group_rows,
    )


def _merging(channels: int) -> tuple[int, dict[str, int]]:
    """Blocks of columns of a kernel that merges the splits of a reduction, and the blocks' sizes: the channels alone decide."""
    most = REDUCING // triton.cdiv(channels, _block_c(channels))
    block_s = triton.next_power_of_2(max(1, min(most, MOST_SPLITS)))
    block_c = max(8, min(64, 2048 // block_s))
    return triton.cdiv(channels, block_c), {"BLOCK_S": block_s, "BLOCK_C": block_c}


def group_statistics(
    x: Tensor, images: int, running: tuple[Tensor, Tensor, Tensor] | None, *, momentum: float, eps: float
) -> Tensor:
    """(3, groups, C) in float32: of each group the mean, what it lacks as a float, and 1 / standard deviation.

    x: as in `batch_norm`, without gradient. running: mean, variance and number of batches, which the first group renews in place.
    """
    (blocks, groups, splits), sizes, group_rows = _tiling(x, images, REDUCING)
    batch, channels, height, width = x.shape
    rows = batch * height * width
    found = torch.empty(2, splits, groups, channels, dtype=torch.float32, device=x.device)
    statistics = torch.empty(3, groups, channels, dtype=torch.float32, device=x.device)
    # Without buffers to renew something must stand in their place, which nothing reads.
    mean, variance, batches = (found, found, found) if running is None else running
    merging, merged = _merging(channels)
    with torch.cuda.device(x.get_device()):
        _moments[(blocks, groups, splits)](
            x, found, rows, group_rows, channels, groups, splits, **sizes, num_warps=WARPS
        )
        _statistics[(merging, groups)](
            x, found, statistics, mean, variance, batches, rows, group_rows, channels, groups, splits, eps, momentum,
            TRACKED=running is not None, BLOCK_R=sizes["BLOCK_R"], **merged, num_warps=4,
        )  # fmt: skip
    return statistics


class TritonBatchNorm(torch.autograd.Function):
    """The map normalised by given statistics and activated; the gradient knows whether they are the batch's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        spread: Tensor,
        images: int,
        eps: float,
        by_batch: bool,
        activation: int,
    ) -> Tensor:
        """One pass. mean, spread: of group_statistics, the first two and the last; or the running mean and variance."""
        grid, sizes, group_rows = _tiling(x, images, MAPPING)
        batch, channels, height, width = x.shape
        y = torch.empty_like(x)
        whole, rest = (mean[0], mean[1]) if by_batch else (mean, mean)
        with torch.cuda.device(x.get_device()):
            _normalise[grid](
                x, y, whole, rest, spread, weight, bias, batch * height * width, group_rows, channels, grid[2], eps,
                BY_BATCH=by_batch, ACTIVATION=activation, **sizes, num_warps=WARPS,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.images, ctx.eps, ctx.by_batch, ctx.activation = images, eps, by_batch, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sums over the map where batch statistics or parameters want them, then the map's gradient where it is wanted."""
        x, weight, bias, mean, spread = ctx.saved_tensors
        images, eps, by_batch, activation = ctx.images, ctx.eps, ctx.by_batch, ctx.activation
        to_map, *to_parameters = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        rows = batch * height * width
        to_x, to_weight, to_bias = None, None, None
        whole, rest = (mean[0], mean[1]) if by_batch else (mean, mean)
        sums = whole  # which nothing reads
        with torch.cuda.device(x.get_device()):
            if any(to_parameters) or by_batch:
                (blocks, groups, splits), sizes, group_rows = _tiling(x, images, REDUCING)
                found = torch.empty(2, splits, groups, channels, dtype=torch.float32, device=x.device)
                sums = torch.empty(2, groups, channels, dtype=torch.float32, device=x.device)
                _slopes[(blocks, groups, splits)](
                    x, grad, whole, rest, spread, weight, bias, found, rows, group_rows, channels, groups, splits, eps,
                    BY_BATCH=by_batch, ACTIVATION=activation, **sizes, num_warps=WARPS,
                )  # fmt: skip
                merging, merged = _merging(channels)
                _sums[(merging, groups)](
                    found, sums, spread, channels, groups, splits, eps,
                    BY_BATCH=by_batch, **merged, num_warps=4,
                )  # fmt: skip
                if any(to_parameters):
                    together = sums.sum(1)
                    to_bias, to_weight = together[0], together[1]
            if to_map:
                to_x = torch.empty_like(x)
                grid, sizes, group_rows = _tiling(x, images, MAPPING)
                _gradient[grid](
                    x, grad, to_x, whole, rest, spread, weight, bias, sums, rows, group_rows, channels, grid[1], grid[2], eps,
                    BY_BATCH=by_batch, ACTIVATION=activation, **sizes, num_warps=WARPS,
                )  # fmt: skip
        return to_x, to_weight, to_bias, None, None, None, None, None, None


def activation_number(activation: Any) -> int | None:
    """Of an activation in the kernels, 0 without one; None where they have it not."""
    if activation is None:
        return 0
    return 1 if activation is F.relu else 2 if activation is F.silu else None


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor, Tensor] | None,
    *,
    images: int,
    by_batch: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: int = 0,
) -> Tensor:
    """(B, C, H, W) normalised and activated, the same shape, dtype and layout.

    x: channels_last, on a GPU, any dtype but float64; all else in float32. running: mean, variance and number of batches,
    by_batch to be renewed from the first group or None; else what normalises. images: in a group, the last may have fewer. activation:
    its `activation_number`.
    """
    if by_batch:
        statistics = group_statistics(x.detach(), images, running, momentum=momentum, eps=eps)
        mean, spread = statistics[:2], statistics[2]
    else:
        assert running is not None, "eval mode needs running statistics"
        (mean, spread, _), images = running, x.shape[0]
    return TritonBatchNorm.apply(x, weight, bias, mean, spread, images, eps, by_batch, activation)
