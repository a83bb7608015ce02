"""Logits (B, C) or (B, C, S) that are worked on together: as many positions as a core's cache holds, where they lie."""

from typing import Any

import torch
from torch import Tensor

CACHED = (
    1 << 18
)  # entries of a (b, C) tensor of which several fit into a core's own cache; of maps, which lie scattered, half as many


def parts(logits: Tensor) -> list[Any]:
    """Where the parts of (B, C) or (B, C, S) lie that are worked on together.

    On a CPU of as many positions as its cache holds, so that a pass over them costs no memory traffic, and a map is not copied whole.
    """
    batch, classes = logits.shape[:2]
    whole = logits.device.type != "cpu" or torch.compiler.is_compiling()
    if logits.ndim == 2:
        rows = batch if whole else max(1, CACHED // classes)
        return [slice(start, start + rows) for start in range(0, batch, rows)]
    size = logits.shape[2]
    rows = batch * size if whole else max(1, CACHED // 2 // classes)
    images, length = max(1, rows // size), min(rows, size)
    return [
        (slice(first, first + images), slice(None), slice(start, start + length))
        for first in range(0, batch, images)
        for start in range(0, size, length)
    ]


def positions(part: Any) -> Any:
    """Where the positions (B,) or (B, S) of a part lie."""
    return part if isinstance(part, slice) else (part[0], part[2])


def as_classes(rows: Tensor, logits: Tensor) -> Tensor:
    """Rows (positions, C) as the logits (B, C) or (B, C, S) are, not copied."""
    return rows if logits.ndim == 2 else rows.view(len(logits), -1, logits.shape[1]).transpose(1, 2)


def broadcast(each: Tensor, logits: Tensor) -> Tensor:
    """(B,) or (B, S) numbers that multiply logits (B, C) or (B, C, S)."""
    return each.unsqueeze(1)
