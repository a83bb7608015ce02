"""Parts of generated pictures, npz files of tens of GB, made into shards of plain arrays: checked first, then streamed.

    prepare([Path("50m_part1.npz"), Path("50m_part2.npz"), ...], Path("data/generated/cifar100_50m"))

A part is never held in memory, packed or not: its array is read row by row from the archive and written on.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from gkl.data.stores import PACKED

ROWS = 8192  # pictures in memory at a time: 25 MB at 32x32
INDEX = "index.json"
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
)  # what zipfile raises of archives


def prepare(
    parts: Sequence[Path], folder: Path, num_classes: int | None = None, locked: bool = False
) -> None:
    """Write the parts' pictures and labels as one shard each, with a checksummed index, into folder; whole or not at all.

    num_classes: what labels must lie below, if that is known. locked: whether the caller is `alone` already.
    Raises FileNotFoundError or ValueError naming the part and what is wrong with it, nearly all of it before anything is written;
    FileExistsError for a folder that holds other parts. A folder that holds these very parts is left as it is.
    """
    if not locked and not (folder / INDEX).exists():
        with alone(folder):
            return prepare(parts, folder, num_classes, locked=True)
    described = [_describe(part) for part in parts]
    if (folder / INDEX).exists():
        if [shard["part"] for shard in read_index(folder)["shards"]] == described:
            return
        raise FileExistsError(f"{folder} holds shards of other parts; choose another folder or remove it")
    shapes = [_checked(part, num_classes) for part in parts]
    if len(sides := {shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"the parts hold pictures of different shapes: {sorted(sides)}")
    needed = sum(int(np.prod(shape)) + 8 * shape[0] for shape in shapes)
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise ValueError(
            f"{folder.parent} has {free:,} bytes left, and these parts need {needed:,}; make room or choose another folder"
        )
    temporary = written(folder, "tmp")
    temporary.mkdir()
    try:
        shards = [
            {**_write_shard(part, temporary, number), "part": described[number]}
            for number, part in enumerate(parts)
        ]
        (temporary / INDEX).write_text(
            json.dumps({"schema": 1, "shards": shards}, indent=1), encoding="utf-8"
        )
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process prepares this folder; what such processes that were killed have left is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        lock = open(path, "w", encoding="utf-8")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
            break
        lock.close()  # the one before has removed it
    try:
        for left in folder.parent.glob(f".{folder.name}.*"):
            if re.fullmatch(rf"\.{re.escape(folder.name)}\.\d+\.(tmp|npz)", left.name):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        path.unlink()
        lock.close()


def written(folder: Path, ending: str) -> Path:
    """Where something of a folder lies while it is written."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.{ending}")


def _describe(part: Path) -> dict[str, Any]:
    """A part by its name, size and the checksums of its members, which an archive has written down."""
    if not part.is_file():
        raise FileNotFoundError(f"no part of generated pictures at {part}")
    try:
        with zipfile.ZipFile(part) as archive:
            checksums = {member.filename: member.CRC for member in archive.infolist()}
    except BROKEN as error:
        raise ValueError(f"{part} is no npz file of image and label, or damaged ({error})") from error
    return {"name": part.name, "bytes": part.stat().st_size, "crc32": checksums}


def _checked(part: Path, num_classes: int | None) -> tuple[int, ...]:
    """The shape of a part's pictures. Raises ValueError naming what can be known wrong before its pictures are read."""
    with _opened(part) as archive:
        for name in ("image.npy", "label.npy"):
            member = archive.getinfo(name)
            if member.flag_bits & 1:
                raise ValueError(
                    f"{part}: {name} is encrypted; unpack it and pack it anew without a password"
                )
            if member.compress_type not in PACKED:
                raise ValueError(
                    f"{part}: {name} is packed in an unknown way ({member.compress_type}); pack it anew with deflate"
                )
            if member.header_offset + member.compress_size > part.stat().st_size:
                raise ValueError(f"{part} is damaged: {name} ends after the file does")
        with archive.open("image.npy") as source:
            shape, dtype = _header(source, part)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
                raise ValueError(f"{part}: image must be (N, H, W, 3) uint8, got {shape} {dtype}")
            _fits(archive, "image.npy", source.tell(), int(np.prod(shape, dtype=object)), part)
        labels = _labels(archive, shape[0], part)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        top = "" if num_classes is None else num_classes - 1
        raise ValueError(f"{part}: labels must lie in 0..{top}, got {low}..{high}")
    return shape


@contextmanager
def _opened(part: Path) -> Iterator[zipfile.ZipFile]:
    """A part as an archive, what is wrong with it a ValueError."""
    try:
        with zipfile.ZipFile(part) as archive:
            yield archive
    except (*BROKEN, KeyError) as error:
        raise ValueError(f"{part} is no npz file of image and label, or damaged ({error})") from error


def _labels(archive: zipfile.ZipFile, count: int, part: Path) -> "np.ndarray[Any, np.dtype[np.int64]]":
    with archive.open("label.npy") as source:
        length, dtype = _header(source, part)
        if length != (count,) or dtype.kind not in "iu":
            raise ValueError(f"{part}: label must be ({count},) integers, got {length} {dtype}")
        _fits(archive, "label.npy", source.tell(), count * dtype.itemsize, part)
        return np.frombuffer(_exactly(source, count * dtype.itemsize, part), dtype).astype(np.int64)


def _fits(archive: zipfile.ZipFile, name: str, header: int, size: int, part: Path) -> None:
    """Raises ValueError where an array is not of the size that its header claims, before that is taken from the memory."""
    if archive.getinfo(name).file_size != header + size:
        raise ValueError(
            f"{part} is damaged: {name} has {archive.getinfo(name).file_size - header:,} bytes of values, and its header says {size:,}"
        )


def _write_shard(part: Path, folder: Path, number: int) -> dict[str, Any]:
    """Stream one part to images_<number>.npy and labels_<number>.npy; returns its line of the index."""
    digest = hashlib.sha256()
    with _opened(part) as archive:
        with archive.open("image.npy") as source:
            shape, _ = _header(source, part)
            path = folder / f"images_{number:03d}.npy"
            images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            for first, rows in _rows(source, shape, part):
                images[first : first + len(rows)] = rows
                digest.update(rows.data)
            images.flush()
        labels = _labels(archive, shape[0], part)
    digest.update(labels.data)
    np.save(folder / f"labels_{number:03d}.npy", labels)
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
        raise ValueError(f"{part} is damaged ({' '.join(str(error).split())})") from error
    if fortran or dtype.hasobject or any(length < 1 for length in shape):
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


def read_index(folder: Path) -> dict[str, Any]:
    """What a prepared folder says of its shards. Raises ValueError where it says nothing."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return dict(index)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / INDEX} cannot be read ({error}); remove {folder} and prepare it again"
        ) from error
