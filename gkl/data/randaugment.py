"""The strong view of FixMatch's published reimplementations: operations drawn with their magnitudes, and Cutout after them.

    strong = rand_augment(image, random.Random(key), operations=3)

Called RandAugment (Cubuk et al. 2020) there, whose common magnitude it does not have: each operation's is uniform over its range.
Source: semilearn/datasets/augmentation/randaugment.py of USB (Wang et al. 2022), to the pixel: Pillow's own operations.
"""

import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

GREY = (125, 123, 114)  # what Cutout fills with
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(
    a: float, b: float, c: float, d: float, e: float, f: float
) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


OPERATIONS: tuple[
    tuple[Operation, float, float], ...
] = (  # an operation, its least and its greatest magnitude
    (lambda image, v: ImageOps.autocontrast(image), 0.0, 1.0),
    (lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.05, 0.95),
    (lambda image, v: ImageEnhance.Color(image).enhance(v), 0.05, 0.95),
    (lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.05, 0.95),
    (lambda image, v: ImageOps.equalize(image), 0.0, 1.0),
    (lambda image, v: image, 0.0, 1.0),
    (lambda image, v: ImageOps.posterize(image, max(1, int(v))), 4.0, 8.0),
    (lambda image, v: image.rotate(v), -30.0, 30.0),
    (lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.05, 0.95),
    (lambda image, v: _affine(1, v, 0, 0, 1, 0)(image), -0.3, 0.3),
    (lambda image, v: _affine(1, 0, 0, v, 1, 0)(image), -0.3, 0.3),
    (lambda image, v: ImageOps.solarize(image, v), 0.0, 256.0),  # type: ignore[arg-type]
    (lambda image, v: _affine(1, 0, v * image.size[0], 0, 1, 0)(image), -0.3, 0.3),
    (lambda image, v: _affine(1, 0, 0, 0, 1, v * image.size[1])(image), -0.3, 0.3),
)


def rand_augment(image: Image.Image, draw: random.Random, operations: int = 3) -> Image.Image:
    """An RGB picture after `operations` of OPERATIONS, drawn with replacement, and a grey square of up to half its side."""
    for operation, low, high in draw.choices(OPERATIONS, k=operations):
        image = operation(image, low + (high - low) * draw.random())
    return _cutout(image, draw.random() * 0.5, draw)


def _cutout(image: Image.Image, share: float, draw: random.Random) -> Image.Image:
    """A grey rectangle whose sides are at most `share` of the picture's; it begins half of that left of a point and above it."""
    if share <= 0.0:
        return image
    width, height = image.size
    side = share * width
    # The source asks numpy for uniform(width), which is from width down to 1: no rectangle is centred on the first pixel.
    x, y = draw.uniform(width, 1.0), draw.uniform(height, 1.0)
    left, top = int(max(0.0, x - side / 2)), int(max(0.0, y - side / 2))
    image = image.copy()
    ImageDraw.Draw(image).rectangle((left, top, min(width, left + side), min(height, top + side)), GREY)
    return image
