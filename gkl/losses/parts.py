"""Rows of logits, (B, C) or (B, C, S), that are worked on together: as many as a core's cache holds, where they lie."""

from typing import Any

import torch
from torch import Tensor

CACHED = 1 << 18  # entries of a (b, C) tensor of which several fit into a core's own cache


def parts(logits: Tensor) -> list[tuple[Any, slice]]:
    """Rows of (B, C) or (B, C, S) that are worked on together, where they lie and which of the positions they are.

    On a CPU as many as its cache holds, so that a pass over them costs no memory traffic, and a map is not copied whole.
    """
    batch, classes = logits.shape[:2]
    whole = logits.device.type != "cpu" or torch.compiler.is_compiling()
    if logits.ndim == 2:
        rows = batch if whole else max(1, CACHED // classes)
        return [(slice(start, start + rows),) * 2 for start in range(0, batch, rows)]
    size = logits.shape[2]
    rows = batch * size if whole else max(1, CACHED // classes)
    images, length = max(1, rows // size), min(rows, size)
    return [
        (
            (slice(first, first + images), slice(None), slice(start, start + length)),
            slice(
                first * size + start,
                min(first + images, batch) * size if images > 1 else first * size + min(start + length, size),
            ),
        )
        for first in range(0, batch, images)
        for start in range(0, size, length)
    ]


def part_of(x: Tensor, part: Any) -> Tensor:
    """Rows (b, C) of a part of (B, C) or (B, C, S)."""
    return x[part] if x.ndim == 2 else x[part].transpose(1, 2).flatten(0, 1).contiguous()


def put_part(x: Tensor, part: Any, rows: Tensor) -> None:
    """Write rows (b, C) into a part of (B, C, S)."""
    place = x[part].transpose(1, 2)
    place.copy_(rows.view_as(place))


def shaped(rows: Tensor, logits: Tensor) -> Tensor:
    """All rows as the logits (B, C) or (B, C, S) are, not copied."""
    return rows if logits.ndim == 2 else rows.view(len(logits), -1, logits.shape[1]).transpose(1, 2)


def broadcast(each: Tensor, logits: Tensor) -> Tensor:
    """(positions,) numbers that multiply logits (B, C) or (B, C, S)."""
    return each.unsqueeze(-1) if logits.ndim == 2 else each.view(len(logits), 1, -1)
