"""Encoded pictures where they lie: a folder, a zip archive, or tar shards; read by name, in any order, by any process.

store = open_store(Path("imagenet"))
picture = decode(store.read(store.names[0]), "pillow")
"""

import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gkl.data.content import hidden
from gkl.data.decoding import PICTURES, Decoder, decode

LARGEST = 1 << 30  # bytes of a picture's file


class PictureError(ValueError):
    """A picture that cannot be had: damaged, encrypted, gone, too large. In one line, with its path."""


class Store:
    """Files by name, "train/n01440764/n01440764_10026.JPEG"; may be handed to worker processes.

    names: of the pictures. others: of the files that are none; what is hidden is in neither.
    """

    names: Sequence[str]
    others: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises KeyError or OSError when there is none of that name, ValueError for one that is too large."""
        raise NotImplementedError(f"{type(self).__name__} must define read")

    def picture(self, name: str, decoder: Decoder) -> Image.Image | Tensor:
        """A picture in RGB, see decode. Raises PictureError."""
        try:
            data = self.read(name)
        except KeyError:
            why = "is not there; bring it back, or start anew without it"
        except OSError as error:
            why = f"cannot be read ({error.strerror or error}); bring it back, or start anew without it"
        except ValueError as error:
            why = str(error)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            # what zipfile raises: encrypted, of a compression that it does not know, damaged
            why = f"cannot be unpacked ({' '.join(str(error).split())}); pack the archive anew, without a password"
        else:
            try:
                return decode(data, decoder)
            except ValueError as error:
                why = str(error)
        raise PictureError(f"{self.path}: picture {name} {why}")

    def listed(self, names: Iterable[str]) -> None:
        """Take the names of files that are there, in order and hidden ones left out."""
        found = sorted({name for name in names if not hidden(name)})
        self.names = [name for name in found if name.lower().endswith(PICTURES)]
        self.others = [name for name in found if not name.lower().endswith(PICTURES)]


def _fitting(size: int) -> int:
    if size > LARGEST:
        raise ValueError(f"has {size:,} bytes, more than a picture's {LARGEST:,}; replace or remove it")
    return size


class Folder(Store):
    """A folder and everything below it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.listed(_below(path))

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        found = os.stat(self.path / name)
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise ValueError("is no regular file; replace or remove it")
        _fitting(found.st_size)
        return (self.path / name).read_bytes()


def _below(path: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not hidden(name)]
        yield from (os.path.relpath(os.path.join(folder, file), path) for file in files)


class Zip(Store):
    """A zip archive. Each process opens it for itself: a file position cannot be shared."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self.listed(info.filename for info in self._archive().infolist() if not info.is_dir())

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        _fitting(self._archive().getinfo(name).file_size)
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
        state = np.array([_as_it_is(path, shard) for shard in self.shards])
        index = _kept_index(kept, state)
        if index is None:
            index = {"shards": state, **_tar_index(path, self.shards)}
            if os.access(path, os.W_OK):
                temporary = path / f".gkl-shards.{os.getpid()}.npz"
                np.savez(temporary, allow_pickle=False, **index)
                temporary.rename(kept)
        self.names = index["names"].tolist()
        self.others = index["others"].tolist()
        self.labels = torch.from_numpy(index["labels"])
        self.places = dict(zip(self.names, index["places"].tolist(), strict=True))

    def read(self, name: str) -> bytes:
        """A picture's bytes."""
        shard, start, size = self.places[name]
        with open(self.shards[shard], "rb") as file:
            file.seek(start)
            return file.read(_fitting(size))


def _as_it_is(path: Path, shard: Path) -> str:
    """What says that a shard is the one that was indexed: written anew, it has another time or inode."""
    found = shard.stat()
    return f"{shard.relative_to(path)} {found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _tars(path: Path) -> list[Path]:
    """The tar files of a folder and of the folders in it; no deeper, where a million pictures may lie."""
    found = (*path.glob("*.tar"), *path.glob("*/*.tar"))
    return sorted(shard for shard in found if not hidden(str(shard.relative_to(path))))


def _kept_index(path: Path, state: "np.ndarray[Any, Any]") -> dict[str, Any] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            index = dict(file)
        return index if np.array_equal(index["shards"], state) and "others" in index else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _tar_index(root: Path, shards: Sequence[Path]) -> dict[str, Any]:
    """names (N,), labels (N,), places (N, 3): shard, first byte, bytes; others: files that are no pictures and no labels.

    A name is the shard's, then the picture's.
    """
    names, labels, places, others = [], [], [], []
    for number, shard in enumerate(shards):
        top = shard.relative_to(root).with_suffix("")
        try:
            found, classes, rest = _members(shard)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{shard} is damaged ({error}); replace it") from error
        others += [str(top / name) for name in rest]
        for key, (name, start, size) in found.items():
            if key not in classes:
                raise ValueError(f"{shard}: picture {name} has no {key}.cls beside it with its class")
            names.append(str(top / name))
            labels.append(classes[key])
            places.append((number, start, size))
    return {
        "names": np.array(names, dtype=np.str_),
        "others": np.array(others, dtype=np.str_),
        "labels": np.array(labels, dtype=np.int64),
        "places": np.array(places, dtype=np.int64).reshape(-1, 3),
    }


def _members(shard: Path) -> tuple[dict[str, tuple[str, int, int]], dict[str, int], list[str]]:
    """Pictures by key: name, first byte, bytes; classes by key; other files."""
    found: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, int] = {}
    others = []
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            key, suffix = os.path.splitext(member.name)
            if not member.isfile() or hidden(member.name):
                continue
            if suffix.lower() in PICTURES:
                if key in found:
                    raise ValueError(f"{shard} has two pictures {member.name} and {found[key][0]} of one key")
                found[key] = (member.name, member.offset_data, member.size)
            elif suffix == ".cls":
                file = archive.extractfile(member)
                assert file is not None
                text = file.read(32).strip()
                if not re.fullmatch(rb"\d{1,9}", text):
                    raise ValueError(
                        f"{shard}: {member.name} needs a class 0, 1, ..., got {text.decode(errors='replace')!r}"
                    )
                classes[key] = int(text)
            else:
                others.append(member.name)
        if (end := archive.offset) > shard.stat().st_size:
            raise ValueError(
                f"{shard} is damaged: it ends before its last picture (byte {end:,}); replace it"
            )
    return found, classes, others


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
