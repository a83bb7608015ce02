"""AutoAugment's CIFAR-10 policy, whole batches at once and pixel for pixel what the published runs' Pillow gives.

    strong = autoaugment(images, sample_keys(seed=0, epoch=3, index=index, stream="autoaugment/0"))    # (B, 3, H, W) uint8

The published code calls Pillow picture by picture, and what Pillow gives turns on its arithmetic: 16.16 fixed point where a
picture is moved or turned, float64 where it is sheared, float32 where two are blended, cut off and not rounded. The operations
here take the same steps, a product and a sum rounded each for itself as in Pillow's x86-64 builds, on every device.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from gkl.rng import integers, uniform

GREY = 128  # what geometric operations bring in at the borders


def autoaugment(images: Tensor, keys: Tensor) -> Tensor:
    """AutoAugment's CIFAR-10 policy (Cubuk et al. 2019). images: (B, 3, H, W) uint8; keys: (B,).

    Each picture draws one of 25 sub-policies, whether each of its two operations happens, and its sign. What is drawn follows
    from keys where they lie: on the CPU no device is waited for to learn which pictures an operation takes.
    """
    policy = integers(keys, 1, len(CIFAR10_POLICY)).squeeze(1)
    chance, negative = uniform(keys + 1, 2), integers(keys + 2, 2, 2)
    operation, probability, level = (table.to(keys.device)[policy] for table in _POLICY)  # (B, 2) each
    amounts = _amounts(*images.shape[-2:]).to(keys.device)[operation, level, negative]  # (B, 2, 6)
    operation = operation.where(chance < probability, len(OPERATIONS))
    sizes = [of.bincount(minlength=len(OPERATIONS) + 1).tolist() for of in operation.unbind(1)]

    # Pictures of one operation lie together: put in the order of the first operations, of the second, and back.
    first, second = operation.argsort(dim=0, stable=True).unbind(1)
    moves = torch.stack([first, first.argsort()[second], second.argsort()]).to(
        images.device, non_blocking=True
    )
    amounts = torch.stack([amounts[first, 0], amounts[second, 1]]).to(images.device, non_blocking=True)
    out = images
    for move, size, by in zip(moves[:2], sizes, amounts, strict=True):
        parts = zip((*OPERATIONS.values(), _nothing), out[move].split(size), by.split(size), strict=True)
        out = torch.cat([operate(part, amount) if len(part) else part for operate, part, amount in parts])
    return out[moves[2]]


def apply(operation: str, images: Tensor, level: int, negative: bool) -> Tensor:
    """One operation at level 0..9 on images (B, 3, H, W) uint8. negative: the sign that a signed one takes."""
    amounts = _amounts(*images.shape[-2:])[list(OPERATIONS).index(operation), level, int(negative)]
    return OPERATIONS[operation](images, amounts.to(images.device, non_blocking=True).expand(len(images), -1))


# --- how much ---------------------------------------------------------------------------------------------------------


def _levels(first: float, last: float) -> list[float]:
    """Levels 0..9 of an operation, the numbers of numpy's linspace."""
    return [first + level * ((last - first) / 9) for level in range(9)] + [last]


SHEAR, SHIFT, ANGLE, ENHANCE = (_levels(0, last) for last in (0.3, 150 / 331, 30, 0.9))
THRESHOLD, BITS = _levels(256, 0), _levels(8, 4)


@lru_cache
def _amounts(height: int, width: int) -> Tensor:
    """(operations, level, sign, 6) float64 on the CPU: what an operation is given for pictures of a size, zeros behind it."""
    return torch.tensor(
        [
            [
                [(*_amount(name, level, sign, height, width), *[0.0] * 6)[:6] for sign in (1, -1)]
                for level in range(10)
            ]
            for name in OPERATIONS
        ],
        dtype=torch.float64,
    )


def _amount(operation: str, level: int, sign: int, height: int, width: int) -> tuple[float, ...]:
    match operation:
        case "shear_y":
            return (sign * SHEAR[level],)
        case "translate_x":
            return _fixed(1, 0, sign * SHIFT[level] * width, 0, 1, 0)
        case "translate_y":
            return _fixed(1, 0, 0, 0, 1, sign * SHIFT[level] * height)
        case "rotate":  # always to one side, as the published code has it; around the middle
            angle = -math.radians(ANGLE[level])
            cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
            x, y = -width / 2, -height / 2
            return _fixed(cos, sin, cos * x + sin * y + width / 2, -sin, cos, -sin * x + cos * y + height / 2)
        case "posterize":
            return (256 - 2 ** (8 - round(BITS[level])),)
        case "solarize":
            return (math.ceil(THRESHOLD[level]),)
        case "brightness" | "color" | "contrast" | "sharpness":
            return (1 + sign * ENHANCE[level],)
    return ()


def _fixed(a: float, b: float, c: float, d: float, e: float, f: float) -> tuple[float, ...]:
    """An affine map from pixels to their sources in fixed point, from the middle of the first pixel on."""
    return tuple(
        math.floor(v * 65536 + 0.5) for v in (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    )


# --- operations: images (n, 3, H, W) uint8, amounts (n, 6) float64 ----------------------------------------------------


def _affine(images: Tensor, amounts: Tensor) -> Tensor:
    """The nearest pixel."""
    height, width = images.shape[-2:]
    a, b, c, d, e, f = amounts.to(torch.int64)[:, :, None, None].unbind(1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    columns, rows = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16  # (n, H, W)
    outside = (columns < 0) | (columns >= width) | (rows < 0) | (rows >= height)
    source = (rows * width + columns).masked_fill_(outside, 0).flatten(1)[:, None]
    taken = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)
    return taken.masked_fill_(outside[:, None], GREY)


def _shear_y(images: Tensor, amounts: Tensor) -> Tensor:
    """Pillow's bicubic: columns stay columns, and rows beyond the first and the last are these."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    y = (torch.arange(height, device=images.device, dtype=torch.float64) + 0.5)[:, None]
    at = amounts[:, :1, None] * x + y  # (n, H, W)
    outside = (at < 0) | (at >= height)
    at = at - 0.5
    row = at.floor()
    way, row = (at - row)[:, None], row.to(torch.int64)
    v1, v2, v3, v4 = (
        images.gather(2, (row + step).clamp_(0, height - 1)[:, None].expand_as(images)).to(torch.float64)
        for step in (-1, 0, 1, 2)
    )
    value = v2 + way * (v3 - v1 + way * (2 * (v1 - v2) + v3 - v4 + way * (v2 - v1 - v3 + v4)))
    return value.clamp_(0, 255).to(torch.uint8).masked_fill_(outside[:, None], GREY)


def _blend(degenerate: Tensor, images: Tensor, amounts: Tensor) -> Tensor:
    """From `degenerate` at 0 to the picture at 1 and on beyond it."""
    start, factor = degenerate.to(torch.float32), amounts[:, :1, None, None].to(torch.float32)
    return ((images - start) * factor + start).clamp_(0, 255).to(torch.uint8)


def _brightness(images: Tensor, amounts: Tensor) -> Tensor:
    return _blend(images.new_zeros(()), images, amounts)


def _color(images: Tensor, amounts: Tensor) -> Tensor:
    return _blend(_grey(images), images, amounts)


def _contrast(images: Tensor, amounts: Tensor) -> Tensor:
    """The degenerate is the mean grey, a whole number."""
    pixels = images.shape[-2] * images.shape[-1]
    mean = (_grey(images).sum((2, 3), keepdim=True) * 2 + pixels) // (2 * pixels)
    return _blend(mean, images, amounts)


def _grey(images: Tensor) -> Tensor:
    """(n, 1, H, W) int32 in 0..255."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _sharpness(images: Tensor, amounts: Tensor) -> Tensor:
    """The degenerate is the mean of 3 x 3 pixels, the middle one five times, but for the border's pixels.

    Pillow sums it up in float32; a thirteenth never lies so near to a half that this rounds another way.
    """
    x = images.to(torch.int16)
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + x[..., 1:-1, 1:-1] * 4
    x[..., 1:-1, 1:-1] = (total * 2 + 13) // 26
    return _blend(x, images, amounts)


def _posterize(images: Tensor, amounts: Tensor) -> Tensor:
    return images & amounts[:, :1, None, None].to(torch.uint8)


def _solarize(images: Tensor, amounts: Tensor) -> Tensor:
    return images.where(images < amounts[:, :1, None, None].to(torch.int16), 255 - images)


def _autocontrast(images: Tensor, amounts: Tensor) -> Tensor:
    """A channel's darkest pixel becomes 0 and its brightest 255; a channel of one grey stays."""
    low, high = (f((2, 3), keepdim=True).to(torch.float64) for f in (images.amin, images.amax))
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / tensor is rounded twice
    stretched = (images * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return images.where(high == low, stretched)


def _equalize(images: Tensor, amounts: Tensor) -> Tensor:
    """Each grey by the share of the channel's pixels that are darker; a channel of (next to) one grey stays."""
    greys = images.flatten(2).to(torch.int64)
    ones = torch.ones((), dtype=torch.int32, device=images.device).expand_as(greys)
    count = ones.new_zeros((*greys.shape[:2], 256)).scatter_add_(2, greys, ones)
    brightest = count.gather(2, greys.amax(2, keepdim=True))
    step = (greys.shape[2] - brightest) // 255
    darker = count.cumsum(2) - count
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255).to(torch.uint8)
    return images.where(step[..., None] == 0, table.gather(2, greys).view_as(images))


def _invert(images: Tensor, amounts: Tensor) -> Tensor:
    return 255 - images


def _nothing(images: Tensor, amounts: Tensor) -> Tensor:
    return images


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shear_y": _shear_y,
    "translate_x": _affine,
    "translate_y": _affine,
    "rotate": _affine,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
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
_STEPS = [step for sub_policy in CIFAR10_POLICY for step in sub_policy]
_POLICY = tuple(  # operation, probability, level
    column.view(-1, 2)
    for column in (
        torch.tensor([list(OPERATIONS).index(operation) for operation, _, _ in _STEPS]),
        torch.tensor([probability for _, probability, _ in _STEPS], dtype=torch.float32),
        torch.tensor([level for _, _, level in _STEPS]),
    )
)
