"""Measures of dense predictions, and how a picture larger than a network's windows is looked at.

counts = Counts.of(predicted, labels, num_classes=150)      # may be added up over pictures and processes
counts.miou(), counts.pixel_accuracy(), counts.iou()        # percent
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.data.dense import BORDER, IGNORED

STRIDE = 2 / 3  # of a window, from one to the next


@dataclass(frozen=True)
class Counts:
    """Pixels of each class where prediction and truth are both it, (C,), and of each that is predicted, and that is true."""

    both: Tensor
    predicted: Tensor
    true: Tensor

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor, num_classes: int) -> "Counts":
        """Of classes (...) and labels (...); where these are IGNORED nothing counts."""
        counted = labels != IGNORED
        predicted, labels = predicted[counted].long(), labels[counted].long()
        return cls(
            *(
                torch.bincount(x, minlength=num_classes)
                for x in (labels[predicted == labels], predicted, labels)
            )
        )

    @classmethod
    def from_rows(cls, rows: Tensor) -> "Counts":
        """Of (3, C)."""
        return cls(*rows.unbind())

    def rows(self) -> Tensor:
        """(3, C), which may be added up."""
        return torch.stack([self.both, self.predicted, self.true])

    def iou(self) -> list[float]:
        """Intersection over union of each class, percent; 0 of one that is neither predicted nor true, as the published code has it."""
        union = self.predicted + self.true - self.both
        found: list[float] = (100.0 * self.both.double() / union.clamp(min=1)).tolist()
        return found

    def miou(self) -> float:
        """Mean of `iou`, percent."""
        return sum(self.iou()) / len(self.both)

    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels that are predicted right, percent."""
        return 100.0 * self.both.sum().item() / max(1, int(self.true.sum()))


def places(size: int, window: int) -> list[int]:
    """Where windows begin that cover `size` >= window pixels, the last one ending with them."""
    stride = math.ceil(window * STRIDE)
    count = math.ceil((size - window) / stride) + 1
    return [min(n * stride, size - window) for n in range(count)]


def segmented(
    logits_fn: Callable[[Tensor], Tensor],
    image: Tensor,
    num_classes: int,
    window: int,
    long_side: int,
    mirrored: bool = True,
) -> Tensor:
    """The class of each pixel, (H, W), of a picture (3, H, W) in [0, 1]: single-scale, by windows, where `mirrored` averaged with their mirror images.

    logits_fn: (b, 3, window, window) in [0, 1] -> (b, C, window, window). long_side: that the picture is resized to before.
    Source: tool/test.py of dvlab-research/APD.
    """
    height, width = image.shape[1:]
    factor = long_side / max(height, width)
    size = [long_side if n == max(height, width) else round(factor * n) for n in (height, width)]
    x = _resized(image - BORDER.to(image), size)
    down, across = (max(window - n, 0) for n in size)
    x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2)) + BORDER.to(image)
    total = x.new_zeros(num_classes, *x.shape[1:], dtype=torch.float64)
    times = x.new_zeros(x.shape[1:], dtype=torch.float64)
    for row in places(x.shape[1], window):
        for column in places(x.shape[2], window):
            here = (slice(row, row + window), slice(column, column + window))
            view = x[:, *here]
            views = [view, view.flip(-1)] if mirrored else [view]
            seen = logits_fn(torch.stack(views)).softmax(1)
            total[:, *here] += (seen[0] + seen[1].flip(-1)) / 2 if mirrored else seen[0]
            times[here] += 1
    probs = (total / times)[:, down // 2 : down // 2 + size[0], across // 2 : across // 2 + size[1]]
    return _resized(probs, [height, width]).argmax(0)


def _resized(x: Tensor, size: list[int]) -> Tensor:
    """(C, H, W) linear between the centres of pixels."""
    return (
        x
        if list(x.shape[1:]) == size
        else F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]
    )
