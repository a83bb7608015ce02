"""Any pictures laid out by class, in a folder, a zip archive or WebDataset shards: decoded into memory, or left in their files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gkl.data.content import check_content
from gkl.data.decoding import Decoder
from gkl.data.files import ImageFiles, long_tail, split
from gkl.data.layout import ByClass, train_and_test
from gkl.data.memory import ImageData, in_memory
from gkl.data.stores import Shards, Store, open_store
from gkl.lines import one_line


def image_folder(
    root: str,
    image_size: int,
    name: str | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    content: str | None = None,
) -> ImageData:
    """Any pictures laid out as train/<class>/* and test/<class>/* (or val/), in a folder or a zip archive of that, or in WebDataset shards.

    Pictures become RGB and, where they are not image_size squares already, are resized to them (bicubic, whole
    picture). train_per_class, test_per_class: only the first so many files of each class by name.
    content: what gkl.data.content says of the pictures, if they must be those.
    Raises FileNotFoundError or ValueError naming what is missing, which picture is damaged, or which classes differ.
    Where there is no train/, it can be evaluated with and not trained on.
    """
    check_content(root, content)
    store = open_store(Path(root))
    names, parts, noticed = _labelled(store)
    train, test = (_by_class(names, part) for part in parts)
    data = in_memory(
        name or store.path.stem, names, train, test, store, image_size, train_per_class, test_per_class
    )
    return replace(data, noticed=noticed)


def image_files(
    root: str,
    image_size: int = 224,
    resize: int = 256,
    decoder: Decoder = "torchvision",
    name: str | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    largest: int | None = None,
    smallest: int | None = None,
    many: int = 100,
    few: int = 20,
    content: str | None = None,
) -> ImageFiles:
    """Any pictures laid out as train/<class>/* and val/<class>/* (or test/) in a folder or zip, or WebDataset shards.

    Shards are tar files with train and val in their paths, a .cls beside each picture. decoder: torchvision is the faster,
    pillow what the published runs used; their views differ by a tenth of a grey level. train_per_class, test_per_class:
    only the first so many of each class by name. With largest and smallest, long-tailed, as CIFAR-10-LT is: so many training
    pictures of the first and the last class; many, few: the bounds of the shots. Raises FileNotFoundError or ValueError naming
    what is wrong.
    """
    if largest is not None and train_per_class is not None:
        raise ValueError(
            f"data.largest={largest} and data.train_per_class={train_per_class} both say how many training pictures are kept; "
            "give one of them"
        )
    check_content(root, content)
    store = open_store(Path(root))
    names, parts, noticed = _labelled(store)
    tail = None if largest is None else long_tail(len(names), largest, smallest or 1)
    kept = (tail or [train_per_class] * len(names), [test_per_class] * len(names))
    train, test = (split(store, _first(part, limits)) for part, limits in zip(parts, kept, strict=True))
    if tail is not None:
        held = torch.bincount(train.labels, minlength=len(names)).tolist()
        for c, needed, there in zip(names, tail, held, strict=True):
            if there < (needed or 0):
                raise ValueError(
                    f"{store.path}: class {one_line(c)} needs {needed} training pictures, got {there}; ask for fewer (data.largest)"
                )
    shots = None if tail is None else (many, few)
    return ImageFiles(
        name or store.path.stem, names, train, test, image_size, resize, decoder, shots, noticed=noticed
    )


def _labelled(store: Store) -> tuple[tuple[str, ...], list[list[tuple[str, int]]], str | None]:
    """Class names, the training and test files with their labels, and a line on what is left out."""
    if isinstance(store, Shards):
        shards = {word: _shards_of(store, word) for word in ("train", "val")}
        if both := sorted(shards["train"] & shards["val"]):
            raise ValueError(
                f"{one_line(store.shards[both[0]])} has train and val in its path; say with one of them what its pictures are for"
            )
        numbered = zip(store.names, store.labels.tolist(), strict=True)
        pairs = [(name, label, store.places[name][0]) for name, label in numbered]
        parts = [[(name, label) for name, label, at in pairs if at in mine] for mine in shards.values()]
        classes = int(store.labels.max()) + 1 if len(store.labels) else 0
        if not parts[1]:
            raise ValueError(
                f"{store.path} needs shards with train and with val in their paths, got {len(store.shards)} others"
            )
        if parts[0] and (bare := sorted({*range(classes)} - {label for _, label in parts[0]})):
            raise ValueError(
                f"{store.path}: {len(bare):,} of {classes:,} classes have no training picture, the first is {bare[0]}; number classes "
                "from 0 on, without gaps"
            )
        return tuple(map(str, range(classes))), parts, None
    found = train_and_test(store)
    names = tuple(sorted(found.test))
    parts = [[(f, k) for k, c in enumerate(names) for f in part[c]] for part in (found.train, found.test)]
    return names, parts, found.noticed


def _by_class(names: Sequence[str], files: Sequence[tuple[str, int]]) -> ByClass:
    found: ByClass = {name: [] for name in names}
    for file, label in files:
        found[names[label]].append(file)
    return found


def _shards_of(store: Shards, word: str) -> set[int]:
    """Numbers of the shards whose paths below the store's, and not their pictures' names, have the word in them."""
    return {n for n, p in enumerate(store.shards) if word in str(p.relative_to(store.path)).lower()}


def _first(files: Sequence[tuple[str, int]], limits: Sequence[int | None]) -> list[tuple[str, int]]:
    """The first so many of each class, in the order that they come in."""
    seen = [0] * len(limits)
    kept = []
    for file, label in files:
        limit = limits[label]
        if limit is None or seen[label] < limit:
            kept.append((file, label))
        seen[label] += 1
    return kept
