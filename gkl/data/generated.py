"""Generated pictures: the published npz parts streamed once into memory-mapped, checksummed shards.

    prepare([Path("50m_part1.npz"), Path("50m_part2.npz"), ...], Path("data/generated/cifar100_50m"))
    pictures = open_shards("data/generated/cifar100_50m")
    images, labels = pictures.take(index)            # (B, 3, H, W) uint8 and (B,) int64, read from the disk

A part is never held in memory, packed or not: its array is read row by row from the archive and written on.
Parts are those of DM-AT (Wang et al. 2023): `image` (N, H, W, 3) uint8 and `label` (N,) integers in one npz file.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gkl.data.memory import ImageData
from gkl.data.preparing import INDEX, ROWS, alone, prepare, read_index, written
from gkl.lines import one_line


@dataclass(frozen=True)
class Generated:
    """Pictures of one or more shards, on disk. name and sha256 stand for all of them in a record."""

    name: str
    sha256: str
    shards: tuple[np.memmap[Any, Any], ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) uint8 and labels (B,) by their numbers (B,), on the CPU."""
        numbers = index.cpu().numpy()
        images = np.empty((len(numbers), *self.shards[0].shape[1:]), dtype=np.uint8)
        first = 0
        for shard in self.shards:
            mine = (numbers >= first) & (numbers < first + len(shard))
            images[mine] = shard[numbers[mine] - first]
            first += len(shard)
        return torch.from_numpy(images).permute(0, 3, 1, 2), self.labels[index.cpu()]


def prepared(root: str) -> str | None:
    """16 hexadecimal digits of the prepared pictures in a folder, as their index has them; None where there are none."""
    folder = Path(root)
    return _whole(read_index(folder))[:16] if (folder / INDEX).exists() else None


def _whole(index: Mapping[str, Any]) -> str:
    """sha256 of all shards."""
    return hashlib.sha256("".join(entry["sha256"] for entry in index["shards"]).encode()).hexdigest()


def open_shards(root: str, num_classes: int, verify: bool = False) -> Generated:
    """The prepared pictures in a folder. verify: read all of them once and compare their checksums.

    Raises FileNotFoundError when there are none, ValueError when a shard is damaged or a label is no class.
    """
    folder = Path(root)
    if not (folder / INDEX).exists():
        raise FileNotFoundError(
            f"no generated pictures in {folder}; fetch DM-AT's npz parts and run "
            f"python scripts/prepare.py generated={folder} parts=[part1.npz,part2.npz]"
        )
    index = read_index(folder)
    shards, labels = [], []
    for number, entry in enumerate(index["shards"]):
        path = folder / f"images_{number:03d}.npy"
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            mine = np.load(folder / f"labels_{number:03d}.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({' '.join(str(error).split())}); remove {folder} and prepare it again"
            ) from error
        if list(images.shape) != entry["shape"] or len(mine) != len(images):
            raise ValueError(
                f"{path} has {images.shape} and its index says {entry['shape']}; prepare it again"
            )
        if entry["labels"][0] < 0 or entry["labels"][1] >= num_classes:
            low, high = entry["labels"]
            raise ValueError(f"{path} has labels {low}..{high}, the data set {num_classes} classes")
        if verify and _digest(images, mine) != entry["sha256"]:
            raise ValueError(
                f"{path} is not what was prepared (sha256); remove {folder} and prepare it again"
            )
        shards.append(images)
        labels.append(torch.from_numpy(mine))
    return Generated(folder.name, _whole(index), tuple(shards), torch.cat(labels))


def _digest(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> str:
    digest = hashlib.sha256()
    for first in range(0, len(images), ROWS):
        digest.update(np.ascontiguousarray(images[first : first + ROWS]).data)
    digest.update(labels.data)
    return digest.hexdigest()


def generated(
    data: ImageData,
    *,
    source: Literal["edm", "class_gaussian"],
    name: str,
    root: str,
    images: int | None = None,
    content: str | None = None,
) -> Generated:
    """The generated pictures of a run: prepared EDM parts in root/name, or a stand-in made from the data's own pictures.

    content: what the prepared parts must be, see `prepared`; None: whatever lies there.

    source: class_gaussian draws `images` pictures from a Gaussian fitted to the training pictures of each class, writes
    them as parts and prepares them; for the scales without EDM's parts, and named wherever its numbers stand.
    """
    if source not in ("edm", "class_gaussian"):
        raise ValueError(f"generated.source must be edm or class_gaussian, got {source!r}")
    if source == "edm":
        pictures = open_shards(str(Path(root) / name), data.num_classes)
        if content is not None and content != pictures.sha256[:16]:
            raise ValueError(
                f"the generated pictures in {Path(root) / name} are {pictures.sha256[:16]}, and this run is of {content}; bring those "
                "back, or start a run of these"
            )
        if pictures.shards[0].shape[1:3] != tuple(data.train_images.shape[2:]):
            raise ValueError(
                f"generated pictures of {pictures.shards[0].shape[1:3]} pixels do not fit {data.name}'s "
                f"{tuple(data.train_images.shape[2:])}"
            )
        return pictures
    if not images:
        raise ValueError("generated.source=class_gaussian needs generated.images, how many to draw")
    folder = Path(root) / f"class_gaussian_{data.sha256[:12]}_{images}"
    if not (folder / INDEX).exists():
        with alone(folder):
            if not (folder / INDEX).exists():  # else another run was faster
                part = written(folder, "npz")
                try:
                    drawn, labels = class_gaussian(data, images)
                    np.savez(part, image=drawn, label=labels)
                    prepare([part], folder, data.num_classes, locked=True)
                finally:
                    part.unlink(missing_ok=True)
    return open_shards(str(folder), data.num_classes)


def class_gaussian(
    data: ImageData, count: int, components: int = 40, seed: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """`count` pictures (count, H, W, 3) uint8 and labels, classes in turn, each from its class's Gaussian.

    The Gaussian keeps the first principal components of the class's training pictures (probabilistic PCA without noise).
    """
    generator = np.random.default_rng(seed)
    flat = data.train_images.permute(0, 2, 3, 1).flatten(1).numpy().astype(np.float64)
    labels = np.arange(count) % data.num_classes
    images = np.empty((count, flat.shape[1]), dtype=np.uint8)
    for label in range(data.num_classes):
        mine, rows = flat[data.train_labels.numpy() == label], np.flatnonzero(labels == label)
        if len(mine) < 2:
            raise ValueError(
                f"class {one_line(data.class_names[label])} has {len(mine)} training pictures, a Gaussian needs 2"
            )
        mean = mine.mean(0)
        _, scales, axes = np.linalg.svd((mine - mean) / np.sqrt(len(mine) - 1), full_matrices=False)
        noise = generator.standard_normal((len(rows), min(components, len(scales))))
        drawn = mean + (noise * scales[: noise.shape[1]]) @ axes[: noise.shape[1]]
        images[rows] = np.rint(drawn.clip(0, 255)).astype(np.uint8)
    height, width = data.train_images.shape[2:]
    return images.reshape(count, height, width, 3), labels.astype(np.int64)
