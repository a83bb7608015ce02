"""What is done to one picture as it is read: cut to size, mirrored, RandAugment; by torchvision and timm, from a key.

    crop = ResizedCrop(scale=(0.08, 1.0), flip=0.5)
    view = crop(decode(data, "pillow"), 224, key=sample_keys(seed, epoch, index, "crop").item())     # (3, 224, 224) uint8

The key alone decides every draw, so a picture looks the same on any number of worker processes and after a restart.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Literal

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

Interpolation = Literal["bilinear", "bicubic", "random"]
Picture = Image.Image | Tensor


class ResizedCrop:
    """ImageNet's training view: a part of the picture of random area and shape, resized, perhaps mirrored.

    scale: smallest and largest share of the picture's area. ratio: of width to height. flip: probability of mirroring.
    interpolation: random takes bilinear or bicubic, as timm does. rand_augment: timm's words for it, "rand-m7-mstd0.5".
    repeats: how many views of a picture stand in a batch, one after the other; an epoch then shows so many fewer pictures.
    """

    views = ("resized_crop",)
    count = None  # of the views that a picture can have: more than can be counted

    def __init__(
        self,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: Interpolation = "bilinear",
        rand_augment: str | None = None,
        repeats: int = 1,
    ) -> None:
        if len(scale) != 2 or not 0.0 < scale[0] <= scale[1] <= 1.0 or not 0.0 <= flip <= 1.0:
            raise ValueError(
                f"augment needs scale=[a, b] with 0 < a <= b <= 1 and flip in [0, 1], got {scale} and {flip}"
            )
        if repeats < 1:
            raise ValueError(f"augment.repeats must be at least 1, got {repeats}")
        self.scale, self.ratio, self.flip = tuple(scale), tuple(ratio), flip
        self.interpolation, self.rand_augment, self.repeats = interpolation, rand_augment, repeats
        self.whole = self.scale == self.ratio == (1.0, 1.0) and not (flip or rand_augment)

    def __call__(self, picture: Picture, size: int, *, key: int) -> Tensor:
        """picture: as gkl.data.stores.decode gives it. Returns (3, size, size) uint8."""
        if self.whole and isinstance(picture, Tensor) and picture.shape[1:] == (size, size):
            return picture  # there is nothing to draw
        with drawing_from(key):
            box = RandomResizedCrop.get_params(picture, self.scale, self.ratio)
            how = self.interpolation
            if how == "random":
                how = "bilinear" if torch.rand(()).item() < 0.5 else "bicubic"
            view = TF.resized_crop(picture, *box, [size, size], InterpolationMode(how), antialias=True)
            if torch.rand(()).item() < self.flip:
                view = TF.horizontal_flip(view)
            if self.rand_augment:
                view = rand_augment(self.rand_augment, size)(pillow(view))
        return tensor(view)


class CentreCrop:
    """ImageNet's test view: the shorter side resized to `resize`, then the middle."""

    def __init__(self, resize: int, interpolation: Literal["bilinear", "bicubic"] = "bilinear") -> None:
        """resize: pixels of the shorter side."""
        self.resize, self.interpolation = resize, InterpolationMode(interpolation)

    def __call__(self, picture: Picture, size: int, *, key: int = 0) -> Tensor:
        """picture: as gkl.data.stores.decode gives it. Returns (3, size, size) uint8."""
        whole = TF.resize(picture, [self.resize], self.interpolation, antialias=True)
        return tensor(TF.center_crop(whole, [size, size]))


class PaddedSquare:
    """LLaVA's view: the whole picture in the middle of a square of one colour, resized (bicubic)."""

    def __init__(self, mean: Sequence[float]) -> None:
        """mean: the colour, of the pictures that the network was trained with, (3,) in [0, 1]."""
        self.colour = tuple(int(255 * value) for value in mean)

    def __call__(self, picture: Picture, size: int, *, key: int = 0) -> Tensor:
        """picture: as gkl.data.stores.decode gives it. Returns (3, size, size) uint8."""
        inside = pillow(picture)
        side = max(inside.size)
        square = Image.new("RGB", (side, side), self.colour)
        square.paste(inside, ((side - inside.width) // 2, (side - inside.height) // 2))
        return CentreCrop(size, "bicubic")(square, size)


@cache
def rand_augment(words: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment as its training script makes it for views of this size: borders of ImageNet's mean grey."""
    mean = tuple(round(255 * value) for value in IMAGENET_DEFAULT_MEAN)
    return rand_augment_transform(words, {"translate_const": int(size * 0.45), "img_mean": mean})


def pillow(picture: Picture) -> Image.Image:
    """The picture as Pillow's."""
    return picture if isinstance(picture, Image.Image) else TF.to_pil_image(picture)


def tensor(picture: Picture) -> Tensor:
    """The picture as a (3, H, W) uint8 tensor."""
    return TF.pil_to_tensor(picture) if isinstance(picture, Image.Image) else picture


@contextmanager
def drawing_from(key: int) -> Iterator[None]:
    """Inside, the random numbers of torch, numpy and Python follow from the key; afterwards they are as they were."""
    legacy = np.random.mtrand._rand  # numpy's global numbers, which timm draws from
    states = random.getstate(), legacy.get_state(), torch.get_rng_state()
    random.seed(key)
    legacy.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(states[0])
        legacy.set_state(states[1])
        torch.set_rng_state(states[2])
