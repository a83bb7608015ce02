"""ADE20K's scene parsing, and what lies as it does: images/{training,validation}/*.jpg and annotations/{training,validation}/*.png.

data = ade20k("ADEChallengeData2016")       # or the zip archive of it
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from gkl.atomic import atomically
from gkl.data.content import check_content, in_bytes
from gkl.data.decoding import Unfit, opened
from gkl.data.dense import IGNORED, DenseData
from gkl.data.stores import Store, open_store
from gkl.lines import one_line

Coding = Literal["from_one", "from_zero"]
PARTS = ("training", "validation")


@dataclass(frozen=True)
class FilePages:
    """Pictures and label maps in files. names: (N, 2) bytes, a picture and its label map. classes: C. coding: see `ade20k`."""

    store: Store
    names: "np.ndarray[Any, Any]"
    classes: int
    coding: Coding

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """See gkl.data.dense.Pages."""
        picture, marked = (name.decode(errors="surrogateescape") for name in self.names[number])
        image: Any = self.store.picture(picture, "pillow")
        return pil_to_tensor(image), torch.from_numpy(self.labels(marked, image.size))

    def labels(self, name: str, size: tuple[int, int]) -> "np.ndarray[Any, Any]":
        """A label map (H, W) uint8 of a picture of a size (W, H), 0 to C - 1 and IGNORED. Raises PictureError."""
        return self.store.made(
            "label map", name, partial(decoded, size=size, classes=self.classes, coding=self.coding)
        )

    def check(self) -> list[int]:
        """Look at each; the classes that they hold. Raises PictureError naming the first that cannot be."""

        def one(number: int) -> "np.ndarray[Any, Any]":
            picture, marked = (name.decode(errors="surrogateescape") for name in self.names[number])
            size = self.store.made("picture", picture, size_of)  # of the header alone
            return np.bincount(self.labels(marked, size).ravel(), minlength=256)

        with ThreadPoolExecutor() as pool:
            there: Any = sum(pool.map(one, range(len(self))), np.zeros(256, np.int64))
        return [int(label) for label in np.flatnonzero(there) if label != IGNORED]

    def digest(self) -> bytes:
        """Of the names; what the files hold is `content`."""
        return hashlib.sha256(b"\n".join([*self.names.flatten().tolist(), self.coding.encode()])).digest()


def size_of(data: bytes) -> tuple[int, int]:
    """(W, H) of a picture, from its header. Raises ValueError for none."""
    with opened(data) as picture:
        return picture.size


def decoded(data: bytes, size: tuple[int, int], classes: int, coding: Coding) -> "np.ndarray[Any, Any]":
    """A label map from its bytes, (H, W) uint8 of 0 to C - 1 and IGNORED. size: (W, H). Raises ValueError for one that is none."""
    with opened(data, ("PNG", "BMP", "TIFF")) as picture:
        if picture.mode not in ("L", "P", "1"):
            coded = (
                "is RGB-coded" if picture.mode in ("RGB", "RGBA") else f"has pixels of mode {picture.mode}"
            )
            raise Unfit(
                f"{coded}, and a label map has one number of 8 bits a pixel; ADE20K's are those of ADEChallengeData2016.zip"
            )
        if picture.size != size:
            raise Unfit(
                f"is of {picture.width} x {picture.height} pixels and its picture of {size[0]} x {size[1]}; bring the one that belongs to it"
            )
        values = np.array(picture, dtype=np.uint8)
    known = range(classes + 1) if coding == "from_one" else [*range(classes), IGNORED]
    there = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    if odd := sorted(set(there.tolist()) - set(known)):
        wanted = (
            f"0 (none) to {classes}" if coding == "from_one" else f"0 to {classes - 1} and {IGNORED} (none)"
        )
        other = "from_zero" if coding == "from_one" else "from_one"
        if coding == "from_one" and odd == [255] and set(there.tolist()) <= {0, 255}:
            raise ValueError(
                f"holds 255, and labels are {wanted}; save a mask of 0 and 255 as 1 and 2, or as 0 and 1 with data.coding=from_zero; where "
                "255 is none and 0 a class, set data.coding=from_zero"
            )
        meant = set(there.tolist()) <= (
            {*range(classes), IGNORED} if coding == "from_one" else {*range(classes + 1)}
        )
        remedy = (
            f"set data.coding={other}" if meant else "set data.classes to how many there are, or replace it"
        )
        raise ValueError(f"holds {odd[0]}, and labels are {wanted}; {remedy}")
    return values - np.uint8(1) if coding == "from_one" else values  # 0 becomes 255


def pairs(store: Store, part: str, remedy: str) -> "np.ndarray[Any, Any]":
    """Names (N, 2) bytes of pictures and their label maps. Raises ValueError naming one without the other."""
    found: dict[str, dict[str, str]] = {"images": {}, "annotations": {}}
    for name in store.names:
        folder = Path(name).parts[-3:-1]
        if len(folder) == 2 and folder[1] == part and folder[0] in found:
            found[folder[0]][Path(name).stem] = name
    images, maps = found["images"], found["annotations"]
    if not images and not maps:
        raise ValueError(
            f"{store.path} has no pictures in images/{part}/ with label maps in annotations/{part}/; {remedy}"
        )
    for some, others, what in (
        (images, maps, "label map in annotations"),
        (maps, images, "picture in images"),
    ):
        if lonely := sorted(some.keys() - others.keys()):
            raise ValueError(
                f"{store.path}: {len(lonely):,} of {len(some):,} files have no {what}/{part}/, the first is {one_line(some[lonely[0]])}; bring "
                "what is missing, or remove them"
            )
    return np.array([[in_bytes(images[stem]), in_bytes(maps[stem])] for stem in sorted(images)])


def ade20k(
    root: str,
    image_size: int = 473,
    long_side: int = 512,
    classes: int = 150,
    coding: Coding = "from_one",
    content: str | None = None,
    cache: str | None = None,
) -> DenseData:
    """ADE20K (Zhou et al. 2017), or any pictures laid out as it is, in a folder or zip archive; every file is looked at first.

    image_size, long_side: see DenseData. coding: of label maps. from_one, as ADE20K has them: 1 to C, and 0 for none; from_zero, as
    people prepare them: 0 to C - 1, and 255 for none. content: what gkl.data.content says of the files, if they must be those.
    cache: folder in which is noted what has been looked at. Raises FileNotFoundError or ValueError, a line on the first file at fault.
    """
    check_content(root, content)
    remedy = "set data.root=... to ADEChallengeData2016, the folder or the archive"
    store = open_store(Path(root), "ADE20K", remedy)
    parts = [FilePages(store, pairs(store, part, remedy), classes, coding) for part in PARTS]
    note = Path(cache) / f"classes-{content}-{classes}-{coding}" if cache and content else None
    if note is not None and note.is_file():
        present = [int(label) for label in note.read_text().split()]
    else:
        present, _ = (part.check() for part in parts)
        if len(present) < 2:
            held = f"class {present[0]} alone" if present else "no class at all"
            known = "255 is none" if coding == "from_zero" else "0 is none, and class 0 is written 1"
            raise ValueError(
                f"{root}: all label maps in annotations/training/ together hold {held}, and there is nothing to learn; with "
                f"data.coding={coding} {known}: a mask of 0 and 255 is to be saved as 0 and 1 with data.coding=from_zero"
            )
        if note is not None:
            with atomically(note) as temporary:
                temporary.write_text(" ".join(map(str, present)))
    names = tuple(_names(store, classes))
    return DenseData(
        "ade20k", names, parts[0], parts[1], image_size, long_side, noticed=_absent(present, classes)
    )


def _absent(present: Sequence[int], classes: int) -> str | None:
    """A line on classes that no training picture has."""
    absent = sorted(set(range(classes)) - set(present))
    if not absent:
        return None
    some = ", ".join(map(str, absent[:5])) + (", ..." if absent[5:] else "")
    return (
        f"no training picture has {len(absent)} of data.classes={classes}, counted from 0 ({some}); each counts in the mean IoU, with 0 "
        "where nothing is it: set data.classes to how many there are"
    )


def _names(store: Store, classes: int) -> Iterable[str]:
    """Of the classes, from objectInfo150.txt where it lies beside; their numbers else."""
    for place in ("objectInfo150.txt", "ADEChallengeData2016/objectInfo150.txt"):
        try:
            lines = store.read(place).decode().splitlines()[1:]
        except (KeyError, OSError, ValueError):
            continue
        found = [re.split(r"[,;]", line.split("\t")[-1])[0].strip() for line in lines if line.strip()]
        if len(found) == classes:
            return found
    return map(str, range(classes))
