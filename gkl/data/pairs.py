"""Where pairs of a picture and a caption come from: numbered lists, and tar shards without number.

    pairs = Shards(Path("datacomp"), samples=15_000_000, lanes=256, shuffle=1000)
    pairs.take(Draw(seed=0, epoch=3), [7, 8], of=256, first=0, count=32)      # the first 32 pairs of an epoch of two of its 256 lanes

A batch takes as many pairs of each lane. What a lane holds follows from (seed, epoch, lane) alone, whichever process or worker reads it,
so that a training goes on anywhere with the pairs that it would have had.
"""

import csv
import hashlib
import io
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gkl.data.batches import epoch_order
from gkl.data.content import hidden, in_bytes
from gkl.data.crops import Picture
from gkl.data.decoding import PICTURES, Decoder, decode
from gkl.data.stores import PictureError, Store, fitting, open_store, tars
from gkl.lines import one_line
from gkl.rng import integers, sample_keys

CAPTION = ".txt"


class Draw(NamedTuple):
    """What the pairs of an epoch follow from."""

    seed: int
    epoch: int


class Pair(NamedTuple):
    """replaced: how many damaged ones were passed over for it."""

    picture: Picture
    caption: str
    replaced: int = 0


class Pairs(ABC):
    """A source of pairs. lanes: how many there are, None where each place of a batch may be one."""

    lanes: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Pairs of an epoch."""

    @abstractmethod
    def take(self, draw: Draw, lanes: Sequence[int], of: int, first: int, count: int) -> list[Pair]:
        """`count` pairs of each of some of `of` lanes from its `first` on, lane by lane. Raises PictureError."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Digest of what they are."""


class Listed(Pairs):
    """Pairs that have numbers: each once an epoch, in the epoch's order. caption: of a number and a key to draw from."""

    def __init__(
        self, count: int, picture: Callable[[int], Picture], caption: Callable[[int, int], str], sha256: str
    ) -> None:
        self.count, self.picture, self.caption, self._sha256 = count, picture, caption, sha256
        self._order: tuple[Draw, Tensor] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def sha256(self) -> str:
        """Digest of the list."""
        return self._sha256

    def take(self, draw: Draw, lanes: Sequence[int], of: int, first: int, count: int) -> list[Pair]:
        """The lanes' part of the order, of which they take turns."""
        if self._order is None or self._order[0] != draw:
            self._order = draw, epoch_order(self.count, draw.seed, draw.epoch)
        places = torch.tensor(lanes)[:, None] + of * torch.arange(first, first + count)
        own = self._order[1][places.flatten()]
        keys = sample_keys(draw.seed, draw.epoch, own, "caption").tolist()
        return [
            Pair(self.picture(n), self.caption(n, key)) for n, key in zip(own.tolist(), keys, strict=True)
        ]


def listed_files(store: Store, files: Sequence[tuple[str, str]], decoder: Decoder) -> Listed:
    """(picture, caption) pairs whose pictures lie in a store."""
    digest = hashlib.sha256(in_bytes("\n".join(f"{name}\0{text}" for name, text in files)))
    return Listed(
        len(files), lambda n: store.picture(files[n][0], decoder), lambda n, _: files[n][1], digest.hexdigest()
    )  # fmt: skip


def named(names: Sequence[str], labels: Sequence[int], templates: Sequence[Callable[[str], str]]) -> Any:
    """Captions of pictures that have a class: its name in a template that the key draws."""
    return lambda n, key: templates[key % len(templates)](names[labels[n]])


def beside(path: Path) -> tuple[Store, list[tuple[str, str]]]:
    """The pictures of a folder or zip archive and the texts beside them, cat.jpg and cat.txt. Raises ValueError for one without."""
    store = open_store(path, "pictures with captions")
    files, bare = [], []
    for name in store.names:
        try:
            files.append((name, _text(store.read(os.path.splitext(name)[0] + CAPTION), f"{path}/{name}")))
        except (KeyError, OSError):
            bare.append(name)
    if bare or not files:
        raise ValueError(
            f"{path}: {len(bare):,} of {len(store.names):,} pictures have no caption beside them"
            + (f", the first is {one_line(bare[0])}; write its text into a file of its name with the ending .txt" if bare else "; there are none")
        )  # fmt: skip
    return store, files


def table(path: Path, separator: str, picture: str, caption: str) -> tuple[Store, list[tuple[str, str]]]:
    """The pairs of a CSV or TSV file, its pictures by their paths from its folder on.

    picture, caption: names of the columns. Raises ValueError for a column that is missing, and for pictures that are.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Excel begins its files with a mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8"
        ) from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file, delimiter=separator)
        columns = list(reader.fieldnames or ())
        for setting, wanted in (("picture", picture), ("caption", caption)):
            if wanted not in columns:
                raise ValueError(
                    f"{path} has no column {wanted!r} but {one_line(', '.join(columns))}; set data.{setting}=..., or data.separator where columns are "
                    "not told apart by what is set"
                )
        rows = [(row[picture], row[caption]) for row in reader]
    if empty := [n for n, (name, text) in enumerate(rows, 2) if not name or not (text or "").strip()]:
        raise ValueError(
            f"{path}: {len(empty):,} lines lack a picture or a caption, the first is line {empty[0]}"
        )
    if missing := [name for name, _ in rows if not (path.parent / name).is_file()]:
        raise ValueError(
            f"{path}: {len(missing):,} of {len(rows):,} captions have no picture, the first is {one_line(missing[0])}; paths count from the folder "
            "of the table"
        )
    return open_store(path.parent, "pictures"), rows


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption of {one_line(where)} is no text in UTF-8; write it again") from error


class Shards(Pairs):
    """Pairs of WebDataset tars, <key>.jpg and <key>.txt side by side, in shards drawn with replacement as OpenCLIP resamples them.

    A lane reads shard after shard from front to back, in blocks of `shuffle` pairs whose order its key draws; one that cannot be decoded
    is replaced by the next of its shard. samples: pairs of an epoch. Raises FileNotFoundError or ValueError.
    """

    def __init__(self, path: Path, samples: int, lanes: int, shuffle: int, decoder: Decoder) -> None:
        if not path.is_dir():
            raise FileNotFoundError(
                f"no folder of tar shards at {path}; set data.root=... to where they lie or are mounted"
            )
        self.path, self.samples, self.lanes, self.shuffle, self.decoder = (
            path, samples, lanes, shuffle, decoder,
        )  # fmt: skip
        self.shards = tars(path)
        if not self.shards:
            raise ValueError(f"{path} has no .tar files in it or in its folders; set data.root=...")
        members(self.shards[0])
        self._places: dict[int, _Place] = {}

    def __len__(self) -> int:
        return self.samples

    @property
    def sha256(self) -> str:
        """Digest of the shards' names and sizes."""
        return _listing(self.path, self.shards)

    def take(self, draw: Draw, lanes: Sequence[int], of: int, first: int, count: int) -> list[Pair]:
        """See Pairs; there are as many lanes as there were to be."""
        found = []
        for lane in lanes:
            place = self._places.get(lane)
            if place is None or place.draw != draw or place.first > first:
                place = self._places[lane] = _Place(self, draw, lane)
            for number in range(first, first + count):
                while number >= place.first + len(place.order):
                    place.next()
                found.append(place.pair(number - place.first))
        return found


def _listing(path: Path, shards: Sequence[Path]) -> str:
    lines = [f"{shard.relative_to(path)}\0{shard.stat().st_size}" for shard in shards]
    return hashlib.sha256(in_bytes("\n".join(lines))).hexdigest()


@cache
def shards_content(root: str) -> str | None:
    """16 hexadecimal digits of the names and sizes of the tars at root, None where there are none: what they hold may be terabytes."""
    path = Path(root)
    found = tars(path) if path.is_dir() else []
    return _listing(path, found)[:16] if found else None


class _Place:
    """Where a lane stands: its `number`-th shard, which has the lane's pairs from `first` on."""

    def __init__(self, source: Shards, draw: Draw, lane: int) -> None:
        self.source, self.draw, self.lane = source, draw, lane
        self.number, self.first, self.order = -1, 0, torch.arange(0)
        self.next()

    def next(self) -> None:
        """Open the next shard."""
        self.first, self.number = self.first + len(self.order), self.number + 1
        key = sample_keys(
            self.draw.seed, self.draw.epoch, torch.tensor([(self.lane << 20) + self.number]), "shard"
        )
        self.shard = self.source.shards[int(integers(key, 1, len(self.source.shards)))]
        try:
            self.members = members(self.shard)
        except (OSError, ValueError) as error:
            raise PictureError(one_line(error)) from error
        generator = torch.Generator().manual_seed(int(key) & (2**63 - 1))
        blocks = torch.arange(len(self.members)).split(self.source.shuffle)
        self.order = torch.cat([block[torch.randperm(len(block), generator=generator)] for block in blocks])

    def pair(self, place: int) -> Pair:
        """The shard's pair at a place of its order, or the first after it that can be decoded."""
        why = ""
        with open(self.shard, "rb") as file:
            for replaced in range(len(self.order)):
                number = int(self.order[(place + replaced) % len(self.order)])
                start, size, begin, length = self.members[number].tolist()
                try:
                    file.seek(start)
                    picture = decode(file.read(fitting(size)), self.source.decoder)
                    file.seek(begin)
                    return Pair(picture, _text(file.read(fitting(length)), str(self.shard)), replaced)
                except ValueError as error:
                    why = str(error)
        raise PictureError(
            f"{one_line(self.shard)}: none of its {len(self.order):,} pairs can be decoded, the last {one_line(why)}"
        )


def members(shard: Path) -> "np.ndarray[Any, Any]":
    """(N, 4): first byte and bytes of a shard's pictures, and of their captions. Raises ValueError where either has none.

    A picture without caption, or a caption without picture, is no pair, as OpenCLIP has it.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {"picture": {}, "caption": {}}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                key, suffix = os.path.splitext(member.name)
                if not member.isreg() or hidden(member.name):
                    continue
                if suffix.lower() in PICTURES:
                    found["picture"][key] = (member.offset_data, member.size)
                elif suffix == CAPTION:
                    found["caption"][key] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{one_line(shard)} is damaged or no plain tar ({one_line(error)}); fetch or write it again"
        ) from error
    pictures, captions = found["picture"], found["caption"]
    keys = [key for key in pictures if key in captions]
    if not keys:
        raise ValueError(
            f"{one_line(shard)} has {len(pictures):,} pictures and {len(captions):,} captions and no pair of them; a shard needs <key>.jpg and "
            "<key>.txt side by side"
        )
    return np.array([(*pictures[key], *captions[key]) for key in keys], dtype=np.int64)
