"""Generated pictures: the published npz parts streamed once into memory-mapped, checksummed shards.

    prepare([Path("50m_part1.npz"), Path("50m_part2.npz"), ...], Path("data/generated/cifar100_50m"))
    pictures = open_shards("data/generated/cifar100_50m")
    images, labels = pictures.take(index)            # (B, 3, H, W) uint8 and (B,) int64, read from the disk

A part is never held in memory, packed or not: its array is read row by row from the archive and written on.
Parts are those of DM-AT (Wang et al. 2023): `image` (N, H, W, 3) uint8 and `label` (N,) integers in one npz file.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from gkl.data.memory import ImageData

ROWS = 8192  # pictures in memory at a time: 25 MB at 32x32
INDEX = "index.json"


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


def prepare(parts: Sequence[Path], folder: Path) -> None:
    """Write the parts' pictures and labels as one shard each, with a checksummed index, into folder; whole or not at all.

    Raises FileNotFoundError or ValueError naming the part and what is wrong with it; FileExistsError for a folder that
    holds other parts. A folder that holds these very parts is left as it is.
    """
    described = [_describe(part) for part in parts]
    if (folder / INDEX).exists():
        if [shard["part"] for shard in _read_index(folder)["shards"]] == described:
            return
        raise FileExistsError(f"{folder} holds shards of other parts; choose another folder or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        shards = [
            {**_write_shard(part, temporary, number), "part": described[number]}
            for number, part in enumerate(parts)
        ]
        sides = {tuple(shard["shape"][1:]) for shard in shards}
        if len(sides) > 1:
            raise ValueError(f"the parts hold pictures of different shapes: {sorted(sides)}")
        (temporary / INDEX).write_text(json.dumps({"schema": 1, "shards": shards}, indent=1))
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _describe(part: Path) -> dict[str, Any]:
    """A part by its name, size and the checksums of its members, which an archive has written down."""
    if not part.is_file():
        raise FileNotFoundError(f"no part of generated pictures at {part}")
    try:
        with zipfile.ZipFile(part) as archive:
            checksums = {member.filename: member.CRC for member in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{part} is no npz file of image and label, or damaged ({error})") from error
    return {"name": part.name, "bytes": part.stat().st_size, "crc32": checksums}


def _write_shard(part: Path, folder: Path, number: int) -> dict[str, Any]:
    """Stream one part to images_<number>.npy and labels_<number>.npy; returns its line of the index."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(part) as archive:
            with archive.open("image.npy") as source:
                shape, dtype = _header(source, part)
                if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
                    raise ValueError(f"{part}: image must be (N, H, W, 3) uint8, got {shape} {dtype}")
                path = folder / f"images_{number:03d}.npy"
                images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
                for first, rows in _rows(source, shape, part):
                    images[first : first + len(rows)] = rows
                    digest.update(rows.data)
                images.flush()
            with archive.open("label.npy") as source:
                length, dtype = _header(source, part)
                if length != shape[:1] or dtype.kind not in "iu":
                    raise ValueError(f"{part}: label must be ({shape[0]},) integers, got {length} {dtype}")
                labels = np.frombuffer(_exactly(source, shape[0] * dtype.itemsize, part), dtype)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ValueError(f"{part} is no npz file of image and label, or damaged ({error})") from error
    digest.update(labels.astype(np.int64).data)
    np.save(folder / f"labels_{number:03d}.npy", labels.astype(np.int64))
    return {
        "shape": list(shape),
        "sha256": digest.hexdigest(),
        "labels": [int(labels.min()), int(labels.max())],
    }


def _header(source: IO[bytes], part: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the npy file that begins here. Never unpickles."""
    try:
        major, _ = np.lib.format.read_magic(source)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(source)
    except ValueError as error:
        raise ValueError(f"{part} is damaged ({error})") from error
    if fortran or dtype.hasobject or 0 in shape:
        raise ValueError(
            f"{part}: arrays must be in C order, of plain numbers and not empty, got {shape} {dtype}"
        )
    return shape, dtype


def _rows(
    source: IO[bytes], shape: tuple[int, ...], part: Path
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    size = int(np.prod(shape[1:]))
    for first in range(0, shape[0], ROWS):
        count = min(ROWS, shape[0] - first)
        yield first, np.frombuffer(_exactly(source, count * size, part), np.uint8).reshape(count, *shape[1:])


def _exactly(source: IO[bytes], size: int, part: Path) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise ValueError(f"{part} is damaged: it ends before its last row")
    return data


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text())
        return dict(index)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / INDEX} cannot be read ({error}); remove {folder} and prepare it again"
        ) from error


def prepared(root: str) -> str | None:
    """16 hexadecimal digits of the prepared pictures in a folder, as their index has them; None where there are none."""
    folder = Path(root)
    return _whole(_read_index(folder))[:16] if (folder / INDEX).exists() else None


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
    index = _read_index(folder)
    shards, labels = [], []
    for number, entry in enumerate(index["shards"]):
        path = folder / f"images_{number:03d}.npy"
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            mine = np.load(folder / f"labels_{number:03d}.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove {folder} and prepare it again") from error
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
        part = folder.with_name(f".{folder.name}.{os.getpid()}.npz")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            drawn, labels = class_gaussian(data, images)
            np.savez(part, image=drawn, label=labels)
            prepare([part], folder)
        except OSError:
            if not (folder / INDEX).exists():  # else another run was faster
                raise
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
                f"class {data.class_names[label]} has {len(mine)} training pictures, a Gaussian needs 2"
            )
        mean = mine.mean(0)
        _, scales, axes = np.linalg.svd((mine - mean) / np.sqrt(len(mine) - 1), full_matrices=False)
        noise = generator.standard_normal((len(rows), min(components, len(scales))))
        drawn = mean + (noise * scales[: noise.shape[1]]) @ axes[: noise.shape[1]]
        images[rows] = np.rint(drawn.clip(0, 255)).astype(np.uint8)
    height, width = data.train_images.shape[2:]
    return images.reshape(count, height, width, 3), labels.astype(np.int64)
