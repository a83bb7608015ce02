"""Encoded pictures where they lie: a folder, a zip archive, or tar shards; read by name, in any order, by any process.

store = open_store(Path("imagenet"))
picture = decode(store.read(store.names[0]), "pillow")
"""

import io
import os
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
Decoder = Literal["pillow", "torchvision"]
# torchvision announces that its decoders will move to torchcodec; until they do they are the fastest (benchmarks/decoding.py).
warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning, r"torchvision\.io")


class Store:
    """Files by name, "train/n01440764/n01440764_10026.JPEG"; may be handed to worker processes."""

    names: Sequence[str]  # of the pictures

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises KeyError or OSError when there is none of that name."""
        raise NotImplementedError(f"{type(self).__name__} must define read")


class Folder(Store):
    """A folder and everything below it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.names = sorted(
            os.path.relpath(os.path.join(folder, file), path)
            for folder, _, files in os.walk(path, followlinks=True)
            for file in files
            if file.lower().endswith(PICTURES)
        )

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        return (self.path / name).read_bytes()


class Zip(Store):
    """A zip archive. Each process opens it for itself: a file position cannot be shared."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self.names = sorted(n for n in self._archive().namelist() if n.lower().endswith(PICTURES))

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        return self._archive().read(name)

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}


class Shards(Store):
    """The tar shards of a folder, as WebDataset writes them: <key>.jpg and <key>.cls side by side.

    Read by offset and not from front to back, so that every epoch has its own order over all pictures and a run can go on
    at any step. Where each picture begins is found once and kept in the folder, if that can be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.shards = _tars(path)
        kept = path / "gkl-shards.npz"
        state = np.array([f"{p.relative_to(path)} {p.stat().st_size}" for p in self.shards])
        index = _kept_index(kept, state)
        if index is None:
            index = {"shards": state, **_tar_index(path, self.shards)}
            if os.access(path, os.W_OK):
                temporary = path / f".gkl-shards.{os.getpid()}.npz"
                np.savez(temporary, allow_pickle=False, **index)
                temporary.rename(kept)
        self.names = index["names"].tolist()
        self.labels = torch.from_numpy(index["labels"])
        self.places = dict(zip(self.names, index["places"].tolist(), strict=True))

    def read(self, name: str) -> bytes:
        """A picture's bytes."""
        shard, start, size = self.places[name]
        with open(self.shards[shard], "rb") as file:
            file.seek(start)
            return file.read(size)


def _tars(path: Path) -> list[Path]:
    """The tar files of a folder and of the folders in it; no deeper, where a million pictures may lie."""
    return sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])


def _kept_index(path: Path, state: "np.ndarray[Any, Any]") -> dict[str, Any] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            index = dict(file)
        return index if np.array_equal(index["shards"], state) else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _tar_index(root: Path, shards: Sequence[Path]) -> dict[str, Any]:
    """names (N,), labels (N,) and places (N, 3): shard, first byte, bytes. A name is the shard's, then the picture's."""
    names, labels, places = [], [], []
    for number, shard in enumerate(shards):
        found: dict[str, tuple[str, int, int]] = {}
        classes: dict[str, int] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, suffix = os.path.splitext(member.name)
                if suffix.lower() in PICTURES:
                    found[key] = (member.name, member.offset_data, member.size)
                elif suffix == ".cls":
                    file = archive.extractfile(member)
                    assert file is not None
                    classes[key] = int(file.read())
        for key, (name, start, size) in found.items():
            if key not in classes:
                raise ValueError(f"{shard}: picture {name} has no {key}.cls beside it with its class")
            names.append(str(shard.relative_to(root).with_suffix("") / name))
            labels.append(classes[key])
            places.append((number, start, size))
    return {
        "names": np.array(names),
        "labels": np.array(labels, dtype=np.int64),
        "places": np.array(places, dtype=np.int64).reshape(-1, 3),
    }


def open_store(
    path: Path, what: str = "picture folder or zip archive", remedy: str = "set data.root=..."
) -> Store:
    """The store at a path. Raises FileNotFoundError or ValueError saying what is missing."""
    if not path.exists():
        raise FileNotFoundError(f"no {what} at {path}; {remedy}")
    if path.is_dir():
        return Shards(path) if _tars(path) else Folder(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a zip archive")
    return Zip(path)


def by_class(names: Sequence[str], split: str) -> dict[str, list[str]]:
    """Names of <anything/>split/<class>/<file>, by class."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.rsplit("/", 3)
        if len(parts) >= 3 and parts[-3] == split:
            found.setdefault(parts[-2], []).append(name)
    return found


def decode(data: bytes, decoder: Decoder) -> Image.Image | Tensor:
    """A picture in RGB: Pillow's, or a (3, H, W) uint8 tensor by torchvision. Raises ValueError for a damaged one."""
    try:
        if decoder == "torchvision":
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return torchvision.io.decode_image(raw, torchvision.io.ImageReadMode.RGB)
        with Image.open(io.BytesIO(data)) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, RuntimeError, SyntaxError) as error:
        raise ValueError(f"is damaged ({error}); replace or remove it") from error


def train_and_test(store: Store) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The files of train/<class>/ and test/<class>/ (or val/) by class. Raises ValueError where they are not so laid out."""
    splits = {split: by_class(store.names, split) for split in ("train", "test", "val")}
    test_split = "test" if splits["test"] else "val"
    train, test = splits["train"], splits[test_split]
    if not train or not test:
        raise ValueError(
            f"{store.path} needs pictures in train/<class>/ and in test/<class>/ or val/<class>/, got {len(store.names)} "
            "pictures elsewhere"
        )
    if set(train) != set(test):
        odd = sorted(set(train) ^ set(test))
        raise ValueError(
            f"{store.path}: train and {test_split} must have the same classes; only one of them has {', '.join(odd[:5])}"
        )
    return train, test
