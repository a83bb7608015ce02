"""scikit-learn's handwritten digits, what scale=smoke trains on: in memory, and as picture files that it writes itself."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gkl.atomic import atomically
from gkl.data.decoding import Decoder
from gkl.data.files import ImageFiles, first_of_classes, long_tail
from gkl.data.layout import train_and_test
from gkl.data.memory import ImageData
from gkl.data.stores import open_store


def digits() -> ImageData:
    """scikit-learn's bundled handwritten digits: 1,797 scans of 8x8 pixels, grey repeated to 3 channels.

    Every fifth scan of the bundled order, from the first, is test: 360 of them; the other 1,437 train.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    labels = torch.from_numpy(bundle.target.astype(np.int64))
    scans = torch.from_numpy(np.rint(bundle.images * 255 / 16).astype(np.uint8))
    images = scans[:, None].expand(-1, 3, -1, -1).contiguous()
    test = torch.arange(len(labels)) % 5 == 0
    return ImageData(
        "digits",
        10,
        images[~test],
        labels[~test],
        images[test],
        labels[test],
        tuple(str(d) for d in range(10)),
    )


def digits_files(
    root: str,
    image_size: int = 32,
    resize: int | None = None,
    decoder: Decoder = "torchvision",
    train_per_class: int | None = None,
    largest: int | None = None,
    smallest: int | None = None,
) -> ImageFiles:
    """scikit-learn's digits, written once under root as train/<digit>/*.png and val/<digit>/*.png, and read from there.

    Beside them the test scans in two other manners: renditions/ (inverted, digits 0 to 4 alone) and sketch/ (edges), which
    stand in for ImageNet-R and ImageNet-Sketch. Other arguments as `tiny_imagenet_files`.
    """
    path = Path(root)
    if not path.is_dir():
        _write_digits(path)
    store = open_store(path)
    found = train_and_test(store)
    names = sorted(found.train)
    kept = [train_per_class] * len(names)
    shots = None
    if largest is not None:
        kept, shots = long_tail(len(names), largest, smallest or 1), (100, 20)
    parts = (
        first_of_classes(store, names, found.train, kept),
        first_of_classes(store, names, found.test, [None] * len(names)),
    )
    name = "digits" if shots is None else "digits_lt"
    return ImageFiles(name, tuple(names), *parts, image_size, resize or image_size, decoder, shots)


def _write_digits(path: Path) -> None:
    """Whole or not at all: several runs may start at once."""
    data = digits()
    try:
        with atomically(path) as temporary:
            for part, images, labels in (
                ("train", data.train_images, data.train_labels),
                ("val", data.test_images, data.test_labels),
                ("renditions", 255 - data.test_images, data.test_labels),
                ("sketch", edges(data.test_images), data.test_labels),
            ):
                for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                    if part == "renditions" and label > 4:
                        continue
                    file = temporary / part / str(label) / f"{number:04d}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    except OSError:
        if not path.is_dir():  # else another run was first
            raise


def edges(images: Tensor) -> Tensor:
    """Differences between neighbouring pixels, the larger of the two directions, (N, 3, H, W) uint8."""
    x = images.to(torch.int16)
    down, across = torch.zeros_like(x), torch.zeros_like(x)
    down[..., 1:, :] = (x[..., 1:, :] - x[..., :-1, :]).abs()
    across[..., 1:] = (x[..., 1:] - x[..., :-1]).abs()
    return torch.maximum(down, across).to(torch.uint8)
