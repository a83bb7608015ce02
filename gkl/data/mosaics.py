"""Pages of four pictures each, every pixel labelled with its cell's class: what stands in for ADE20K where that is too large.

    data = digits_mosaics(train_pages=400, test_pages=100, image_size=65)

A page is cut in two each way, where follows from its number; a pixel between cells is ignored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.data.dense import IGNORED, DenseData, MemoryPages
from gkl.data.digits import digits
from gkl.data.memory import ImageData
from gkl.data.tiny_imagenet import tiny_imagenet
from gkl.rng import integers, sample_keys

PHOTOGRAPHS = ("china.jpg", "flower.jpg")


def digits_mosaics(train_pages: int, test_pages: int, image_size: int = 65) -> DenseData:
    """scikit-learn's scans of digits, white over parts of the two photographs that it ships, darkened; train and test share neither.

    image_size: pixels of a page's side, 8 n + 1.
    """
    return mosaics(digits(), train_pages, test_pages, image_size, photographs())


def tiny_imagenet_mosaics(
    root: str, train_pages: int, test_pages: int, image_size: int = 129, classes: int | None = None, content: str | None = None
) -> DenseData:  # fmt: skip
    """Tiny-ImageNet's pictures, four a page. classes: only the first so many. Errors as in tiny_imagenet."""
    return mosaics(tiny_imagenet(root, 64, classes, content=content), train_pages, test_pages, image_size)


def mosaics(
    data: ImageData, train_pages: int, test_pages: int, image_size: int, behind: Tensor | None = None
) -> DenseData:
    """Of a data set's pictures. behind: photographs (P, 3, H, W) uint8 that pictures are laid over as white ink; None: they cover all.

    Test pages show test pictures, over the right quarter of the photographs; training pages the left three.
    """
    made: list[MemoryPages] = []
    for part, pages, images, labels in (
        ("train", train_pages, data.train_images, data.train_labels),
        ("test", test_pages, data.test_images, data.test_labels),
    ):
        ground = None
        if behind is not None:
            edge = behind.shape[-1] * 3 // 4
            ground = behind[..., :edge] if part == "train" else behind[..., edge:]
        made.append(_pages(pages, part, images, labels, image_size, ground))
    return DenseData(f"{data.name}_mosaics", data.class_names, made[0], made[1], image_size, image_size)


def _pages(
    count: int, part: str, images: Tensor, labels: Tensor, size: int, ground: Tensor | None
) -> MemoryPages:
    """So many pages (size x size) of pictures (N, 3, H, W) with labels (N,), all from their numbers."""
    keys = sample_keys(0, 0, torch.arange(count), f"mosaics/{part}")
    cuts = integers(keys, 2, size // 3 + 1) + size // 3  # in the middle third
    chosen = integers(keys + 1, 4, len(images))
    pages = torch.zeros(count, 3, size, size)
    if ground is not None:
        which, rows, columns = (
            integers(keys + 2 + k, 1, n)[:, 0]
            for k, n in enumerate((len(ground), ground.shape[2] - size + 1, ground.shape[3] - size + 1))
        )
        for page, n, row, column in zip(pages, which, rows, columns, strict=True):
            page.copy_(ground[n, :, row : row + size, column : column + size])
    marked = torch.full((count, size, size), IGNORED, dtype=torch.uint8)
    for number, (at, four) in enumerate(zip(cuts.tolist(), chosen.tolist(), strict=True)):
        for n, picture in enumerate(four):
            place = tuple(
                slice(0, c) if k == 0 else slice(c + 1, size) for c, k in zip(at, divmod(n, 2), strict=True)
            )
            cell = pages[number, :, *place]
            seen = F.interpolate(images[picture][None].float(), cell.shape[1:], mode="bilinear")[0]
            cell.copy_(seen if ground is None else cell + (255.0 - cell) * seen / 255.0)
            marked[number, *place] = int(labels[picture])
    return MemoryPages(pages.round().to(torch.uint8), marked)


def photographs() -> Tensor:
    """The two that scikit-learn ships, half as large and half as bright, (2, 3, 213, 320) uint8."""
    from sklearn.datasets import load_sample_image

    both = torch.stack(
        [torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1) for name in PHOTOGRAPHS]
    )
    return (F.avg_pool2d(both.float(), 2) / 2).round().to(torch.uint8)
