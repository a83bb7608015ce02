"""ImageNet-LT (Liu et al. 2019): the published lists of ImageNet's pictures."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from gkl.data.content import check_same
from gkl.data.content import content as content_of
from gkl.data.decoding import Decoder
from gkl.data.files import ImageFiles, split
from gkl.data.imagenet import check_there
from gkl.data.stores import open_store
from gkl.lines import one_line

# The published lists of ImageNet-LT (Liu et al. 2019): lines, and classes with > 100, 20..100 and < 20 training pictures.
LISTS = {"train": 115_846, "val": 20_000, "test": 50_000}


PROFILE = (385, 479, 136)


def imagenet_lt(
    root: str, lists: str, image_size: int = 224, resize: int = 256, decoder: Decoder = "torchvision",
    content: str | None = None, lists_content: str | None = None,
) -> ImageFiles:  # fmt: skip
    """ImageNet-LT: the pictures of ImageNet under root that the published lists name; test is the list of that name.

    lists: folder with ImageNet_LT_train.txt, _val.txt, _test.txt, a path and a class a line. content, lists_content: what
    gkl.data.content says of root (`listing`) and lists (`content`), if they must be those. Other arguments as `image_files`.
    Raises FileNotFoundError or ValueError when lists or pictures are missing, or the lists are not the published ones by
    their lines and the number of pictures a class has.
    """
    check_same(f"the lists at {lists}", lists_content, lambda: content_of(lists))
    listed = {
        part: read_list(Path(lists) / f"ImageNet_LT_{part}.txt", count) for part, count in LISTS.items()
    }
    classes = max(label for _, label in listed["train"]) + 1
    counts = torch.bincount(torch.tensor([label for _, label in listed["train"]]), minlength=classes)
    profile = (
        int((counts > 100).sum()),
        int(((counts >= 20) & (counts <= 100)).sum()),
        int((counts < 20).sum()),
    )
    if classes != 1000 or profile != PROFILE:
        raise ValueError(
            f"{lists}/ImageNet_LT_train.txt is another list: needs 1000 classes, {_profile(PROFILE)}; got {classes}, "
            f"{_profile(profile)}"
        )
    check_there(root, content)
    store = open_store(Path(root))
    known = {os.path.splitext(os.path.basename(name))[0]: name for name in store.names}
    parts = []
    for part in ("train", "test"):
        missing = [path for path, _ in listed[part] if _stem(path) not in known]
        if missing:
            raise ValueError(
                f"{root} lacks {len(missing):,} of the {len(listed[part]):,} pictures of ImageNet-LT's {part} list, "
                f"the first is {one_line(missing[0])}; complete ImageNet there"
            )
        parts.append(split(store, [(known[_stem(path)], label) for path, label in listed[part]]))
    wnids = sorted({path.split("/")[1] for path, _ in listed["train"]})
    return ImageFiles("imagenet_lt", tuple(wnids), parts[0], parts[1], image_size, resize, decoder, (100, 20))


def _stem(path: str) -> str:
    """A picture's own name: lists, folders and shards lay the same pictures out in different ways."""
    return os.path.splitext(os.path.basename(path))[0]


def _profile(counts: Sequence[int]) -> str:
    return f"{counts[0]} many, {counts[1]} medium, {counts[2]} few"


def read_list(path: Path, lines: int) -> list[tuple[str, int]]:
    """(path, class) a line. Raises FileNotFoundError or ValueError when the file is missing, truncated or another one."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no list {path}; take ImageNet-LT's three lists (Liu et al. 2019, {', '.join(f'{n:,}' for n in LISTS.values())} "
            "lines) and set data.lists=FOLDER"
        )
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not (label.isascii() and label.isdecimal()):
            raise ValueError(f"{path}, line {number}: needs a path and a class, got {line[:80]!r}")
        found.append((name, int(label)))
    if len(found) != lines:
        raise ValueError(f"{path} is not the published list: needs {lines:,} lines, got {len(found):,}")
    return found
