"""Encoded pictures where they lie: a folder, a zip archive, or tar shards; read by name, in any order, by any process.

store = open_store(Path("imagenet"))
picture = store.picture(store.names[0], "pillow")

One file, since each kind of place lists, opens and refuses the same things in its own way.
"""

import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gkl.atomic import atomically
from gkl.data.content import CHUNK, backslashed, hidden, members, walk
from gkl.data.decoding import PICTURES, UNREAD, Decoder, decode, is_picture
from gkl.lines import one_line

T = TypeVar("T")
LARGEST = 1 << 30  # bytes of a picture's file
BESIDE = (
    ".txt",
    ".json",
    ".csv",
    ".xml",
    ".md",
    ".cls",
    ".html",
)  # what lies among pictures and is not looked into
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class PictureError(ValueError):
    """A picture that cannot be had: damaged, encrypted, gone, too large. In one line, with its path."""


class Store:
    """Files by name, "train/n01440764/n01440764_10026.JPEG"; may be handed to worker processes.

    names: of the pictures. unread: of pictures whose endings are not read, or that have none. empty: folders without any. Nothing hidden.
    """

    names: Sequence[str]
    unread: Sequence[str] = ()
    empty: Sequence[str] = ()
    others: Sequence[str] = ()  # the first few files that are no pictures

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises KeyError or OSError when there is none of that name, ValueError for one that is too large."""
        raise NotImplementedError(f"{type(self).__name__} must define read")

    def picture(self, name: str, decoder: Decoder) -> Image.Image | Tensor:
        """A picture in RGB, see decode. Raises PictureError."""
        return self.made("picture", name, partial(decode, decoder=decoder))

    def made(self, what: str, name: str, make: Callable[[bytes], T]) -> T:
        """What `make` makes of a file's bytes, or raises ValueError saying why not. Raises PictureError with its words. what: it is."""
        try:
            data = self.read(name)
        except KeyError:
            why = "is not there; bring it back, or start anew without it"
        except OSError as error:
            why = f"cannot be read ({error.strerror or error}); bring it back, or start anew without it"
        except ValueError as error:
            why = str(error)
        except Exception as error:  # of a damaged archive zipfile and what unpacks raise anything
            why = f"cannot be unpacked ({' '.join(str(error).split())}); pack the archive anew, without a password"
        else:
            try:
                return make(data)
            except ValueError as error:
                why = str(error)
        raise PictureError(one_line(f"{self.path}: {what} {name} {why}"))

    def start(self, name: str) -> bytes:
        """How a file begins, empty where that cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} must define start")

    def listed(self, files: Iterable[str], folders: Iterable[str]) -> None:
        """Take the names of what is there."""
        files = sorted({name for name in files if not hidden(name)})
        self.names = [name for name in files if name.lower().endswith(PICTURES)]
        self.others = [name for name in files if not name.lower().endswith(PICTURES)][:3]
        self.unread = [
            name
            for name in files
            if name.lower().endswith(UNREAD)
            or (not name.lower().endswith((*PICTURES, *BESIDE)) and is_picture(self.start(name)))
        ]
        full: set[str] = set()
        for name in (*self.names, *self.unread):
            while (name := os.path.dirname(name)) and name not in full:
                full.add(name)
        self.empty = sorted({name for name in folders if not hidden(name)} - full)


def fitting(size: int) -> int:
    """A picture's bytes. Raises ValueError for too many."""
    if size > LARGEST:
        raise ValueError(f"has {size:,} bytes, more than a picture's {LARGEST:,}; replace or remove it")
    return size


class Folder(Store):
    """A folder and everything below it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        below = list(walk(path))
        self.listed(
            [os.path.join(at, name) for at, names in below for name in names], [at for at, _ in below if at]
        )

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        found = os.stat(self.path / name)
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise ValueError("is no regular file; replace or remove it")
        fitting(found.st_size)
        return (self.path / name).read_bytes()

    def start(self, name: str) -> bytes:
        """How a file begins."""
        with suppress(OSError):
            if stat.S_ISREG(os.stat(self.path / name).st_mode):
                with open(self.path / name, "rb") as file:
                    return file.read(12)
        return b""


class Zip(Store):
    """A zip archive. Each process opens it for itself: a file position cannot be shared."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._state = _state(path)
        try:
            found = members(self._archive())
            self._backslashed = backslashed(self._archive())
        except Exception as error:  # zipfile's own and others', of bytes that anybody may have written
            raise ValueError(f"{path} is damaged ({one_line(error)}); fetch or pack it again") from error
        folders = [name for name, _ in found if name.endswith("/")]  # is_dir needs a name
        files = (name for name, _ in found if not name.endswith("/"))
        self.listed(files, [name.rstrip("/") for name in folders])
        self._check(found)

    def _check(self, found: Sequence[tuple[str, zipfile.ZipInfo]]) -> None:
        """Raises ValueError for pictures that cannot be unpacked."""
        pictures = set(self.names)
        for what, shut in (
            ("encrypted", [name for name, i in found if i.flag_bits & 1]),
            ("links", [name for name, i in found if stat.S_ISLNK(i.external_attr >> 16)]),
            ("packed in an unknown way", [name for name, i in found if i.compress_type not in PACKED]),
        ):
            if shut := [name for name in shut if name in pictures]:
                raise ValueError(
                    f"{self.path}: {len(shut):,} of {len(pictures):,} pictures are {what}, the first is {one_line(shut[0])}; pack them anew, "
                    "with deflate, without a password and with what links lead to"
                )

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        name = self._stored(name)
        fitting(self._archive().getinfo(name).file_size)
        return self._archive().read(name)

    def start(self, name: str) -> bytes:
        """How a file begins."""
        try:
            with self._archive().open(self._stored(name)) as file:
                return file.read(12)
        except Exception:  # encrypted or damaged: no picture that could be had
            return b""

    def _stored(self, name: str) -> str:
        return name.replace("/", "\\") if self._backslashed else name

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            _unchanged(self.path, self._state)
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
        self.shards = tars(path)
        kept = path / "gkl-shards.npz"
        self._states = [_state(shard) for shard in self.shards]
        state = np.array(
            [f"{p.relative_to(path)} {s}" for p, s in zip(self.shards, self._states, strict=True)]
        )
        index = _kept_index(kept, state)
        if index is None:
            index = {"shards": state, **_tar_index(path, self.shards)}
            if os.access(path, os.W_OK):
                with atomically(kept) as temporary, open(temporary, "wb") as file:
                    np.savez(file, allow_pickle=False, **index)
        self.names = index["names"].tolist()
        self.labels = torch.from_numpy(index["labels"])
        self.places = dict(zip(self.names, index["places"].tolist(), strict=True))

    def read(self, name: str) -> bytes:
        """A picture's bytes."""
        shard, start, size = self.places[name]
        with open(self.shards[shard], "rb") as file:
            _unchanged(file.fileno(), self._states[shard])
            file.seek(start)
            return file.read(fitting(size))


def _state(file: Path | int) -> str:
    """What says that a file is the one that it was: written anew, it has another time or inode."""
    found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _unchanged(file: Path | int, state: str) -> None:
    if _state(file) != state:
        raise ValueError("is in an archive that was written anew since this run began; start again")


def tars(path: Path) -> list[Path]:
    """The tar files of a folder and of the folders in it; no deeper, where a million pictures may lie."""
    found = (*path.glob("*.tar"), *path.glob("*/*.tar"))
    return sorted(shard for shard in found if not hidden(str(shard.relative_to(path))))


def _is_unpacked(path: Path) -> bool:
    """Whether pictures lie in folders of folders: then the tar files beside them are what they came in."""
    return any(name.lower().endswith(PICTURES) for at, names in walk(path) if os.sep in at for name in names)


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
        try:
            found, classes = _members(shard)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{one_line(shard)} is damaged or no plain tar ({one_line(error)}); fetch or write it again"
            ) from error
        for key, (name, start, size) in found.items():
            if key not in classes:
                raise ValueError(
                    f"{one_line(shard)}: picture {one_line(name)} has no {one_line(key)}.cls beside it with its class; archives of class "
                    "folders are to be unpacked"
                )
            names.append(str(shard.relative_to(root).with_suffix("") / name))
            labels.append(classes[key])
            places.append((number, start, size))
    return {
        "names": np.array(names, dtype=np.str_),
        "labels": np.array(labels, dtype=np.int64),
        "places": np.array(places, dtype=np.int64).reshape(-1, 3),
    }


def _members(shard: Path) -> tuple[dict[str, tuple[str, int, int]], dict[str, int]]:
    """By key: a shard's pictures (name, first byte, bytes), and their classes. Raises ValueError naming what is wrong in it."""
    found: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, int] = {}
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            key, suffix = os.path.splitext(member.name)
            if member.isdir() or hidden(member.name):
                continue
            if suffix.lower() in UNREAD or (suffix.lower() in PICTURES and not member.isreg()):
                what = "is a link" if suffix.lower() in PICTURES else "has an ending that is not read"
                raise ValueError(
                    f"{one_line(shard)}: picture {one_line(member.name)} {what}; write the shard with PNG or JPEG"
                )
            if suffix.lower() in PICTURES:
                if key in found:
                    raise ValueError(
                        f"{one_line(shard)} has two pictures of one key, {one_line(found[key][0])} and {one_line(member.name)}"
                    )
                found[key] = (member.name, member.offset_data, member.size)
            elif suffix == ".cls" and (file := archive.extractfile(member)) is not None:
                said = file.read(40).decode(errors="replace").strip()
                if not (said.isascii() and said.isdecimal() and len(said) < 10):
                    raise ValueError(
                        f"{one_line(shard)}: {one_line(member.name)} needs a class, a number from 0 on, got {said!r}"
                    )
                classes[key] = int(said)
        end = archive.offset
    with open(
        shard, "rb"
    ) as file:  # a damaged header is the end to tarfile, as is that of the first of two tars in one
        file.seek(end)
        if file.read(CHUNK).strip(b"\0") or end > shard.stat().st_size:
            raise ValueError(
                f"{one_line(shard)} is damaged, or several in one, from byte {end:,} on; fetch or write it again"
            )
    return found, classes


def open_store(
    path: Path, what: str = "picture folder or zip archive", remedy: str = "set data.root=..."
) -> Store:
    """The store at a path. Raises FileNotFoundError or ValueError saying what is missing."""
    if not path.exists():
        raise FileNotFoundError(f"no {what} at {path}; {remedy}")
    if path.is_dir():
        return Shards(path) if tars(path) and not _is_unpacked(path) else Folder(path)
    if path.suffix.lower() in (".npz", ".npy"):
        raise ValueError(
            f"{path} holds arrays, which are not read; save them as PNG in train/<class>/ and test/<class>/"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is neither a folder nor a zip archive; unpack it, or save its pictures in class folders"
        )
    return Zip(path)
