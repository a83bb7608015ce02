"""Mixup and CutMix: a batch blended with itself in reverse order, the labels with it.

mixing = Mixing(mixup=0.1, cutmix=1.0)
x, target = mixing(x, labels, num_classes=1000, first_group=0, group_size=256, draw=(seed, epoch, step))
"""

import hashlib
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """Each group of a batch (one card's share) draws mixup or CutMix, as likely one as the other, and one proportion.

    mixup, cutmix: parameters a of the Beta(a, a) that the proportion comes from; 0 switches one off. smoothing: of the labels.
    Source: Zhang et al. 2018, Yun et al. 2019, as timm's batch mode has them.
    """

    mixup: float
    cutmix: float
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or self.mixup + self.cutmix == 0 or not 0 <= self.smoothing < 1:
            raise ValueError(
                "mixing needs mixup and cutmix >= 0, one of them above 0, and smoothing in [0, 1), got "
                f"{self.mixup}, {self.cutmix} and {self.smoothing}"
            )

    def __call__(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        first_group: int,
        group_size: int,
        draw: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor]:
        """Mixed images like x (b, 3, H, W), and their target distributions (b, C) in x's dtype.

        labels: (b,). first_group: the number of the first group here among the whole batch's, so that processes draw what one
        process would. draw: what else the draws follow from, (seed, epoch, step).
        """
        onehot = F.one_hot(labels, num_classes).to(x.dtype)
        onehot = onehot * (1.0 - self.smoothing) + self.smoothing / num_classes
        mixed = [
            self._group(images, target, random.Random(_seed(*draw, first_group + number)))
            for number, (images, target) in enumerate(
                zip(x.split(group_size), onehot.split(group_size), strict=True)
            )
        ]
        return torch.cat([images for images, _ in mixed]), torch.cat([target for _, target in mixed])

    def _group(self, x: Tensor, target: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
        cut = self.cutmix > 0 and (self.mixup == 0 or draw.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        keep = draw.betavariate(alpha, alpha)
        if cut:
            height, width = x.shape[-2:]
            top, bottom, left, right = box(height, width, keep, draw)
            keep = 1.0 - (bottom - top) * (right - left) / (height * width)
            x = x.clone()
            x[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
        else:
            x = keep * x + (1.0 - keep) * x.flip(0)
        return x, keep * target + (1.0 - keep) * target.flip(0)


def box(height: int, width: int, keep: float, draw: random.Random) -> tuple[int, int, int, int]:
    """top, bottom, left, right of a box of the picture's shape and 1 - keep of its area, cut off at the borders."""
    share = math.sqrt(1.0 - keep)
    half_height, half_width = int(height * share) // 2, int(width * share) // 2
    y, x = draw.randrange(height), draw.randrange(width)
    return (
        max(0, y - half_height), min(height, y + half_height),
        max(0, x - half_width), min(width, x + half_width),
    )  # fmt: skip


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(f"mixing/{numbers}".encode()).digest()[:8], "little")
