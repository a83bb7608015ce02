"""Augmentation of whole batches on the device they are on.

    views = Views(["crop_flip", "autoaugment"], padding=4, flip=0.5)
    basic, strong = views(images, seed=0, epoch=3, index=index)      # each (B, 3, H, W) uint8

Every draw comes from gkl.rng: a sample's views depend on (seed, epoch, index) and not on its batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.data.autoaugment import autoaugment
from gkl.rng import integers, sample_keys, uniform


class Views:
    """One or more independently drawn views of each image.

    views: names in VIEWS. padding: pixels of border a crop may reach into. flip: probability of mirroring.
    border: what lies there, black or the picture's reflection.
    """

    def __init__(
        self,
        views: Sequence[str] = ("crop_flip",),
        padding: int = 4,
        flip: float = 0.5,
        border: Literal["black", "reflect"] = "black",
    ) -> None:
        unknown = [view for view in views if view not in VIEWS]
        if unknown or not views:
            raise ValueError(f"augment.views must name some of {', '.join(VIEWS)}, got {list(views)}")
        if padding < 0 or not 0.0 <= flip <= 1.0:
            raise ValueError(f"augment needs padding >= 0 and flip in [0, 1], got {padding} and {flip}")
        self.views, self.padding, self.flip, self.border = tuple(views), padding, flip, border

    @property
    def count(self) -> int | None:
        """How many views an image can have; None where they cannot be counted."""
        return 2 * (2 * self.padding + 1) ** 2 if set(self.views) == {"crop_flip"} else None

    def numbers(self, *, seed: int, epoch: int, index: Tensor) -> tuple[Tensor, ...]:
        """Which of its `count` views each image gets, (B,) int64 for each of `views`: those that calling this makes.

        The number is (row * (2 padding + 1) + column) * 2 + mirrored. Raises ValueError where views cannot be counted.
        """
        if self.count is None:
            raise ValueError(f"the views {list(self.views)} cannot be counted, those of crop_flip can")
        made = []
        for number in range(len(self.views)):
            keys = sample_keys(seed, epoch, index, f"crop_flip/{number}")
            offsets, mirrored = crop_flip_draws(keys, padding=self.padding, flip=self.flip)
            rows, columns = offsets.unbind(1)
            made.append((rows * (2 * self.padding + 1) + columns) * 2 + mirrored)
        return tuple(made)

    @property
    def recordable(self) -> bool:
        """Whether `seen` asks for nothing of its draws' values, so that a CUDA graph can hold it."""
        return all("autoaugment" not in VIEWS[view] for view in self.views)

    def draws(self, *, seed: int, epoch: int, index: Tensor) -> Tensor:
        """The keys that each operation of each view draws from, (operations, B) int64. index: (B,) places in the data set."""
        streams = [
            f"{operation}/{number}" for number, view in enumerate(self.views) for operation in VIEWS[view]
        ]
        return torch.stack([sample_keys(seed, epoch, index, stream) for stream in streams])

    def seen(self, images: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
        """One tensor like images, (B, 3, H, W) uint8, per view. draws: on the CPU, where views are not recordable."""
        made, keys = [], iter(draws)
        for view in self.views:
            out = images
            for operation in VIEWS[view]:
                if operation == "crop_flip":
                    out = crop_flip(out, next(keys), padding=self.padding, flip=self.flip, border=self.border)
                else:
                    out = OPERATIONS[operation](out, next(keys))
            made.append(out)
        return tuple(made)

    def __call__(self, images: Tensor, *, seed: int, epoch: int, index: Tensor) -> tuple[Tensor, ...]:
        """images: (B, 3, H, W) uint8. index: (B,) places in the data set, on the CPU. One tensor like images per view.

        What is drawn follows from index alone: on the CPU, so that no device is waited for to learn which pictures an operation takes.
        """
        return self.seen(images, self.draws(seed=seed, epoch=epoch, index=index))


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255.0)


def crop_flip_draws(keys: Tensor, *, padding: int, flip: float) -> tuple[Tensor, Tensor]:
    """Offsets of a crop in the padded image, (B, 2) in 0..2 padding, and whether it is mirrored, (B,) bool."""
    return integers(keys, 2, 2 * padding + 1), uniform(keys + 1, 1).squeeze(1) < flip


def crop_flip(
    images: Tensor, keys: Tensor, *, padding: int, flip: float, border: Literal["black", "reflect"] = "black"
) -> Tensor:
    """Random crop of the padded image to its own size, mirrored with probability `flip`.

    images: (B, C, H, W), any dtype. keys: (B,) from gkl.rng. Uniform over the (2 padding + 1)^2 offsets.
    """
    batch, _, height, width = images.shape
    keys = keys.to(images.device, non_blocking=True)
    draws, mirrored = crop_flip_draws(keys, padding=padding, flip=flip)
    rows = (
        draws[:, :1] + torch.arange(height, device=images.device) - padding
    )  # (B, H) of the source, -1 and less: border
    columns = draws[:, 1:] + torch.arange(width, device=images.device) - padding
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    if border == "reflect":  # -1 is 1 and H is H - 2, as numpy's pad has it
        rows = (height - 1) - ((height - 1) - rows.abs()).abs()
        columns = (width - 1) - ((width - 1) - columns.abs()).abs()
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    source = (
        rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    )  # (B, H, W)
    source = source.view(batch, 1, height * width).expand(-1, images.shape[1], -1)
    out = images.flatten(2).gather(2, source).view_as(images)
    return out * inside[:, None]


def rotate15(images: Tensor, keys: Tensor) -> Tensor:
    """Turned by an angle uniform in [-15, 15] degrees, nearest neighbour, black corners. (B, 3, H, W) uint8; keys: (B,).

    What torchvision's RandomRotation(15) does, each picture of the batch by its own angle.
    """
    angle = (uniform(keys.to(images.device, non_blocking=True), 1).squeeze(1).to(torch.float64) * 30 - 15) * (
        math.pi / 180
    )
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    height, width = images.shape[-2:]
    theta = torch.stack([cos, sin * (height / width), zero, -sin * (width / height), cos, zero], dim=1).view(
        -1, 2, 3
    )  # from output to source, in units of half a picture
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    turned = F.grid_sample(images.to(torch.float64), grid, mode="nearest", align_corners=False)
    return turned.to(images.dtype)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"autoaugment": autoaugment, "rotate15": rotate15}
# A view is these operations in turn.
VIEWS: dict[str, tuple[str, ...]] = {
    "crop_flip": ("crop_flip",),
    "crop_flip_rotate": ("crop_flip", "rotate15"),
    "autoaugment": ("crop_flip", "autoaugment"),
    "autoaugment_first": ("autoaugment", "crop_flip"),
}
