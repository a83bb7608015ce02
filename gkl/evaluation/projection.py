"""FAB's projection onto a hyperplane within the box of pixels, without the package's sort."""

import torch
from torch import Tensor


def projection_linf(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """The step of least maximum norm from each point onto its hyperplane {z: w.z = b} within the unit box, (B, n) as points.

    Where the box does not reach the plane, the step ends in the box's corner nearest to it. normals: w, (B, n). offsets: b, (B,).
    FAB's projection, where the package sorts the n coordinates: a step of length s covers sum_i |w_i| min(s, room_i) of the
    gap, concave in s, so Newton's method from below reaches the very s in a few passes.
    """
    normals, room, gap, step = _first(points, normals, offsets)
    size = normals.abs()
    while True:
        further = _further(step, size, room, gap)
        if not (further > step).any():
            return _along(normals, room, step)
        step = further


def projection_linf_in(
    passes: int, points: Tensor, normals: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by so many passes, nothing read back from the device, and whether any point needs more, bool ()."""
    normals, room, gap, step = _first(points, normals, offsets)
    size = normals.abs()
    for _ in range(passes):
        before, step = step, _further(step, size, room, gap)
    return _along(normals, room, step), (step > before).any()


def _first(points: Tensor, normals: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normals that point uphill, the room below each coordinate, the gap and a step that is not too long, (B, 1) each."""
    gap = (normals * points).sum(1) - offsets
    normals = torch.where(
        gap[:, None] < 0, -normals, normals
    )  # so that each step leads down along its normal
    room = torch.where(normals < 0, 1 - points, points)
    size, gap = normals.abs(), gap.abs()[:, None]
    reached = gap < (size * room).sum(1, keepdim=True)
    return normals, room, gap, torch.where(reached, gap / size.sum(1, keepdim=True), torch.inf)


def _further(step: Tensor, size: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """A pass of Newton's method; the same step where it has arrived."""
    short = gap - (size * torch.minimum(step, room)).sum(1, keepdim=True)
    slope = (size * (room > step)).sum(1, keepdim=True)
    return torch.where((slope > 0) & (short > 0), step + short / slope, step)


def _along(normals: Tensor, room: Tensor, step: Tensor) -> Tensor:
    return -normals.sign() * torch.minimum(step, room)
