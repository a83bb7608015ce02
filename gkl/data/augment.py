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
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

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


def autoaugment(images: Tensor, keys: Tensor) -> Tensor:
    """AutoAugment's CIFAR-10 policy (Cubuk et al. 2019). images: (B, 3, H, W) uint8; keys: (B,).

    Each sample draws one of 25 sub-policies, whether each of its two operations happens, and its sign. Borders that
    geometric operations bring in are grey (128), as in the authors' policy; they work on Pillow images, whose
    nearest-neighbour rotation and integer rounding differ from torchvision's by single pixels and grey levels.
    """
    policy = integers(keys, 1, len(CIFAR10_POLICY)).squeeze(1)
    chance, sign = uniform(keys + 1, 2), integers(keys + 2, 2, 2)
    drawn = []  # operation, level, sign, and the pictures that take it
    for number, sub_policy in enumerate(CIFAR10_POLICY):
        for place, (operation, probability, level) in enumerate(sub_policy):
            for negative in (False, True):
                takes = (policy == number) & (chance[:, place] < probability) & (sign[:, place] == negative)
                if len(who := takes.nonzero().squeeze(1)):
                    drawn.append((operation, level, negative, who))
    out = images.clone()
    if drawn:
        everyone = torch.cat([who for *_, who in drawn]).to(images.device, non_blocking=True)
        for (operation, level, negative, _), who in zip(
            drawn, everyone.split([len(d[-1]) for d in drawn]), strict=True
        ):
            out[who] = apply(operation, out[who], level, negative)
    return out


def apply(operation: str, images: Tensor, level: int, negative: bool) -> Tensor:
    """One AutoAugment operation at level 0..9 on images (B, 3, H, W) uint8. `negative`: which sign a signed one takes."""
    height, width = images.shape[-2:]
    sign = -1.0 if negative else 1.0
    amount = level / 9
    grey = [128.0, 128.0, 128.0]
    if operation == "shear_y":
        degrees = math.degrees(math.atan(sign * 0.3 * amount))
        return TF.affine(images, 0.0, [0, 0], 1.0, [0.0, degrees], InterpolationMode.NEAREST, grey, [0, 0])
    if operation == "translate_x" or operation == "translate_y":
        by = int(sign * 150 / 331 * amount * (width if operation == "translate_x" else height))
        shift = [by, 0] if operation == "translate_x" else [0, by]
        return TF.affine(images, 0.0, shift, 1.0, [0.0, 0.0], InterpolationMode.NEAREST, grey)
    if operation == "rotate":
        return TF.rotate(images, sign * 30 * amount, InterpolationMode.NEAREST, fill=grey)
    if operation in ENHANCE:
        return ENHANCE[operation](images, 1.0 + sign * 0.9 * amount)
    if operation == "posterize":
        return TF.posterize(images, 8 - round(4 * amount))
    if operation == "solarize":
        return TF.solarize(images, 255.0 * (1 - amount))
    return PLAIN[operation](images)


ENHANCE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": TF.adjust_brightness,
    "color": TF.adjust_saturation,
    "contrast": TF.adjust_contrast,
    "sharpness": TF.adjust_sharpness,
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "autocontrast": TF.autocontrast,
    "equalize": TF.equalize,
    "invert": TF.invert,
}
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"autoaugment": autoaugment, "rotate15": rotate15}
# A view is these operations in turn.
VIEWS: dict[str, tuple[str, ...]] = {
    "crop_flip": ("crop_flip",),
    "crop_flip_rotate": ("crop_flip", "rotate15"),
    "autoaugment": ("crop_flip", "autoaugment"),
    "autoaugment_first": ("autoaugment", "crop_flip"),
}

# (operation, probability, level) twice per sub-policy; Cubuk et al. 2019, Table 7.
CIFAR10_POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)
