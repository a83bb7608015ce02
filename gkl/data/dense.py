"""Pictures with a label for each pixel: where they lie, what a training sees of them, step by step.

    data = mosaics_of_digits(...)           # or gkl.data.ade20k
    batch = data.batches(augment=DenseCrop(), ...).batch(epoch, step)        # a Batch of views and label maps

A view is made on the CPU from a key that follows from (seed, epoch, picture), so it is the same in any process and after a restart.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.data.batches import Batch
from gkl.data.files import FileBatches
from gkl.data.stores import PictureError
from gkl.data.workers import loader

IGNORED = 255  # the label of a pixel that has none
ATTEMPTS = 100  # crops without a label in a row, after which a data set has none worth the name
BORDER = torch.tensor([0.485, 0.456, 0.406]).view(
    3, 1, 1
)  # beyond a picture: ImageNet's mean, 0 once normalised
BLUR = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0


class Pages(Protocol):
    """Pictures by number, each with its label map."""

    def __len__(self) -> int:
        """How many."""

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """A picture (3, H, W) and its labels (H, W), both uint8. Raises PictureError."""

    def digest(self) -> bytes:
        """What they are."""


@dataclass(frozen=True)
class MemoryPages:
    """Pictures (N, 3, H, W) and labels (N, H, W), uint8."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """See Pages."""
        return self.images[number], self.labels[number]

    def digest(self) -> bytes:
        """Of all pixels and labels."""
        whole = hashlib.sha256(self.images.contiguous().numpy().data)
        whole.update(self.labels.contiguous().numpy().data)
        return whole.digest()


@dataclass(frozen=True)
class DenseData:
    """A data set with a label for each pixel, 0 to C - 1 or IGNORED.

    image_size: of a training's crops and of the windows that test pictures are looked at through, 8 n + 1. long_side: that test
    pictures are resized to.
    """

    name: str
    class_names: tuple[str, ...]
    train: Pages
    test: Pages
    image_size: int
    long_side: int
    noticed: str | None = None  # a line on what may be wrong with it

    in_memory: ClassVar[bool] = False
    shots: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.image_size % 8 != 1:
            raise ValueError(
                f"data.image_size={self.image_size} must be 8 n + 1 ({self.image_size // 8 * 8 + 1}): a network's map is an eighth, corners aligned"
            )

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def train_labels(self) -> Tensor:
        """Which pictures are labelled, (N,): all, pixel by pixel."""
        return torch.arange(len(self.train))

    @property
    def test_labels(self) -> Tensor:
        """As train_labels."""
        return torch.arange(len(self.test))

    @property
    def sha256(self) -> str:
        """Digest of what the pictures and labels are."""
        return hashlib.sha256(self.train.digest() + self.test.digest()).hexdigest()

    def batches(self, *, augment: Any, **settings: Any) -> "DenseBatches":
        """A training's batches. Raises ValueError for settings that such data cannot have."""
        if not isinstance(augment, DenseCrop):
            raise ValueError(f"{self.name} needs augment=dense_crop, got {type(augment).__name__}")
        idle = ("generated", "generated_share", "held_out", "held_out_by_class", "views_together")
        if any([settings.pop(name, None) for name in idle]):
            raise ValueError(f"{self.name} takes no generated pictures and holds none out; leave them out")
        data: Any = self
        return DenseBatches(data, augment, **settings)  # type: ignore[arg-type]

    def test_batches(
        self, numbers: Tensor, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The middle of test pictures (b, 3, S, S) in [0, 1], and their labels (b, S, S) uint8, by number."""
        batches = [[(int(n), 0) for n in few] for few in numbers.split(batch_size) if len(few)]
        for images, labels, _ in loader(DenseViews(self.test, None, self.image_size), batches, workers):
            yield images, labels


class DenseBatches(FileBatches):
    """Crops and their label maps, made ahead of the steps by worker processes."""

    def views(self) -> Any:
        """What makes a view by (number, key)."""
        data: Any = self.data
        return DenseViews(data.train, self.augment, data.image_size)  # type: ignore[arg-type]

    def batch(self, epoch: int, step: int) -> Batch:
        """This process's part of a step: images (b, 3, S, S) in [0, 1], labels (b, S, S), IGNORED where there is none."""
        images, labels, index = self.ahead(epoch, step)
        x, y, view = (t.to(self.device, non_blocking=True) for t in (images, labels, torch.zeros_like(index)))
        return Batch(x, index.new_zeros(0, len(index), device=self.device), y.long(), view, index)


class DenseViews(torch.utils.data.Dataset[Any]):
    """By (number, key): a training's crop of a picture or, without a `crop`, its middle; the labels; the number."""

    def __init__(self, pages: Pages, crop: "DenseCrop | None", size: int) -> None:
        self.pages, self.crop, self.size = pages, crop, size

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[Tensor, Tensor, int] | PictureError:
        """A crop without a label is replaced by another picture's. An error is given back and not raised."""
        number, key = drawn
        draw = random.Random(key)
        try:
            if self.crop is None:
                image, labels = self.pages.read(number)
                return *cut(image.float() / 255.0 - BORDER, labels, self.size, None), number
            for _ in range(ATTEMPTS):
                image, labels = self.crop(*self.pages.read(number), self.size, draw)
                if bool((labels[::8, ::8] != IGNORED).any()):  # what a network's map shows of it
                    return image, labels, number
                number = draw.randrange(len(self.pages))
        except PictureError as error:
            return error
        return PictureError(
            f"{ATTEMPTS} crops in a row show no labelled pixel; the label maps hold next to none but ignored ones"
        )


class DenseCrop:
    """APD's training view: resized, turned, blurred, mirrored, cut out, in this order; beyond the picture mean grey, and no label.

    zoom: smallest and largest factor. rotation: up to so many degrees either way, half of the pictures. blur, flip: probabilities.
    Source: util/transform.py of dvlab-research/APD. Pictures are OpenCV's within 0.001 grey levels, labels exactly.
    """

    views = ("dense_crop",)
    count = None
    repeats = 1

    def __init__(
        self, zoom: Sequence[float] = (0.5, 2.0), rotation: float = 10.0, blur: float = 0.5, flip: float = 0.5
    ) -> None:
        if len(zoom) != 2 or not 0.0 < zoom[0] <= zoom[1]:
            raise ValueError(f"augment.zoom must be [a, b] with 0 < a <= b, got {list(zoom)}")
        self.zoom, self.rotation, self.blur, self.flip = (
            (float(zoom[0]), float(zoom[1])),
            rotation,
            blur,
            flip,
        )

    def __call__(
        self, image: Tensor, labels: Tensor, size: int, draw: random.Random
    ) -> tuple[Tensor, Tensor]:
        """Views (3, size, size) in [0, 1] and (size, size) of a picture (3, H, W) and its labels (H, W), uint8."""
        factor = self.zoom[0] + (self.zoom[1] - self.zoom[0]) * draw.random()
        x, y = zoomed(image.float() / 255.0 - BORDER, factor), zoomed_labels(labels, factor)
        if draw.random() < 0.5:
            x, y = turned(x, y, self.rotation * (2.0 * draw.random() - 1.0))
        if draw.random() < self.blur:
            x = blurred(x)
        if draw.random() < self.flip:
            x, y = x.flip(-1), y.flip(-1)
        return cut(x, y, size, draw)


def zoomed(x: Tensor, factor: float) -> Tensor:
    """A picture (C, H, W) resized by a factor, linear between the centres of pixels."""
    for dim in (-2, -1):
        size = x.shape[dim]
        place = ((torch.arange(max(1, round(size * factor))) + 0.5) / factor - 0.5).clamp(0, size - 1)
        low = place.long()
        share = (place - low).to(x.dtype)
        share = share[:, None] if dim == -2 else share
        high = (low + 1).clamp(max=size - 1)
        x = x.index_select(dim, low) * (1.0 - share) + x.index_select(dim, high) * share
    return x


def zoomed_labels(labels: Tensor, factor: float) -> Tensor:
    """Labels (H, W) resized by a factor: of pixel i the one at floor(i / factor)."""
    for dim in (-2, -1):
        size = labels.shape[dim]
        place = (torch.arange(max(1, round(size * factor))) / factor).long().clamp(max=size - 1)
        labels = labels.index_select(dim, place)
    return labels


def turned(x: Tensor, labels: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """A picture (C, H, W), whose border is 0, and its labels turned about (W / 2, H / 2), against the clock."""
    height, width = labels.shape
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    cos, sin = angle.cos(), angle.sin()
    down = torch.arange(height, dtype=torch.float64)[:, None] - height / 2
    across = torch.arange(width, dtype=torch.float64)[None] - width / 2
    column, row = (
        cos * across - sin * down + width / 2,
        sin * across + cos * down + height / 2,
    )  # of the source
    grid = torch.stack([2 * column / max(1, width - 1) - 1, 2 * row / max(1, height - 1) - 1], -1)
    made = F.grid_sample(x[None], grid[None].to(x.dtype), "bilinear", "zeros", align_corners=True)[0]
    near_row, near_column = (row + 0.5).floor().long(), (column + 0.5).floor().long()
    inside = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
    found = labels[near_row.clamp(0, height - 1), near_column.clamp(0, width - 1)]
    return made, found.masked_fill(~inside, IGNORED)


def blurred(x: Tensor) -> Tensor:
    """A picture (C, H, W) by OpenCV's Gaussian of 5 pixels."""
    padded = F.pad(x[:, None], (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(padded, BLUR.view(1, 1, 5, 1)), BLUR.view(1, 1, 1, 5))[:, 0]


def cut(x: Tensor, labels: Tensor, size: int, draw: random.Random | None) -> tuple[Tensor, Tensor]:
    """A square of a picture (3, H, W), whose border is 0, in [0, 1] again, and of its labels: a random one, or the middle."""
    down, across = (max(size - n, 0) for n in labels.shape)
    edges = (across // 2, across - across // 2, down // 2, down - down // 2)
    x, labels = F.pad(x, edges), F.pad(labels, edges, value=IGNORED)
    row, column = (draw.randint(0, n - size) if draw else (n - size) // 2 for n in labels.shape)
    window = (slice(row, row + size), slice(column, column + size))
    return (x[:, *window] + BORDER).contiguous(), labels[window].contiguous()
