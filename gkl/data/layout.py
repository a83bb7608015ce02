"""Pictures laid out by class: train/<class>/<picture> and test/<class>/<picture> (or val/). What would be left out is refused.

parts = train_and_test(open_store(Path("pictures")))
parts.train["cat"]      # ["train/cat/1.jpg", ...]
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gkl.data.stores import Store
from gkl.lines import one_line

TESTED = ("test", "val", "validation", "valid")  # the first that has train's classes
SPLITS = ("train", "val", "validation", "valid", "test")
ByClass = dict[str, list[str]]


@dataclass
class Names:
    """The names of one split. flat: right in it, of no class. nested: deeper than in a class's folder."""

    by_class: ByClass = field(default_factory=dict)
    flat: list[str] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)

    def all(self) -> list[str]:
        """Every one."""
        return [*(name for names in self.by_class.values() for name in names), *self.flat, *self.nested]


def by_split(names: Iterable[str], splits: Sequence[str]) -> dict[str, Names]:
    """Names of <anything/>split/<class>/<picture>, and what lies in a split in another way."""
    found = {split: Names() for split in splits}
    for name in names:
        parts = name.split("/")
        if parts[-3:-2] and parts[-3] in found:
            found[parts[-3]].by_class.setdefault(parts[-2], []).append(name)
        elif parts[-2:-1] and parts[-2] in found:
            found[parts[-2]].flat.append(name)
        elif inside := next((part for part in parts[:-3] if part in found), None):
            found[inside].nested.append(name)
    return found


def classes_of(store: Store, splits: Sequence[str], top: str = "") -> dict[str, ByClass]:
    """The pictures of each split by class. top: where the store's names lie. Raises ValueError for what would be left out."""
    here, unread, empty = (
        by_split([f"{top}{name}" for name in names], splits)
        for names in (store.names, store.unread, [f"{folder}/" for folder in store.empty])
    )
    for split in splits:
        found = here[split]
        if not found.by_class and split != "train" and any(here[s].by_class for s in splits if s != "train"):
            continue  # ImageNet's own test/ has no classes: the other one is tested with
        for names, what, remedy in (
            (found.nested, f"lie deeper than {split}/<class>/", "move them into the folders of their classes"),
            (found.flat, f"lie in {split}/ itself", _sorting(split)),
            (unread[split].all(), f"in {split}/ have endings that are not read, or none", "save them as PNG or JPEG, or move them away"),
        ):  # fmt: skip
            if names:
                raise ValueError(
                    f"{store.path}: {len(names):,} pictures {what}, the first is {one_line(names[0].removeprefix(top))}; {remedy}"
                )
        if found.by_class and (bare := sorted(empty[split].by_class)):
            raise ValueError(
                f"{store.path}: {len(bare):,} folders of {split}/ have no picture in them, the first is {split}/{one_line(bare[0])}; remove "
                "them, or put their pictures there"
            )
        tops = sorted({str(Path(name).parents[2]) for names in found.by_class.values() for name in names})
        if len(tops) > 1:
            raise ValueError(
                f"{store.path} has {len(tops)} folders {split}/, in {one_line(tops[0])} and in {one_line(tops[1])}; set data.root to the one that is meant"
            )
    return {split: here[split].by_class for split in splits}


def _sorting(split: str) -> str:
    line = f"sort them into {split}/<class>/"
    if split == "train":
        return line
    return f"{line} (ImageNet's validation pictures: run valprep.sh of github.com/soumith/imagenetloader.torch in {split}/)"


@dataclass(frozen=True)
class Parts:
    """Files by class to train and to test with, and a line on what lies beside them and is left out."""

    train: ByClass
    test: ByClass
    noticed: str | None = None


def train_and_test(store: Store) -> Parts:
    """The files of train/<class>/ and test/<class>/ by class; where there is no train/, for an evaluation, none to train with.

    val/ (validation/, valid/) is tested with where there is no test/<class>/, or one of other classes than train/, as pictures without
    labels are. Raises ValueError where they are not so laid out.
    """
    splits = classes_of(store, SPLITS)
    train, there = splits["train"], [split for split in TESTED if splits[split]]
    if not there:
        found = "none to test with" if train else f"{len(store.names)} pictures elsewhere"
        if store.names:
            found += "; name the folders so, or link them so (to evaluate, test/ alone is enough)"
        elif store.others:
            found = f"{one_line(', '.join(store.others))}: save the pictures as PNG or JPEG in such folders"
        raise ValueError(
            f"{store.path} needs pictures in train/<class>/ and in test/<class>/ or val/<class>/, got {found}"
        )
    tested = next((split for split in there if set(splits[split]) == set(train)), there[0])
    test = splits[tested]
    if train and set(train) != set(test):
        odd = sorted(set(train) ^ set(test))
        hint = f"sort {tested}/ into train's classes, or take out what is no class"
        if len({unicodedata.normalize("NFC", name) for name in odd}) < len(odd):
            hint = "two look alike and are written otherwise in Unicode (NFC, and NFD as on a Mac): give one the other's name"
        sides = [
            f"only {split}/ has {one_line(', '.join(alone[:4]))}{f' and {len(alone) - 4} more' if len(alone) > 4 else ''}"
            for split, alone in (
                ("train", sorted(set(train) - set(test))),
                (tested, sorted(set(test) - set(train))),
            )
            if alone
        ]
        raise ValueError(
            f"{store.path}: train and {tested} must have the same classes; {'; '.join(sides)}; {hint}"
        )
    apart = [split for split in TESTED if split != tested]
    beside = by_split((name for name in store.names if any(f"{split}/" in name for split in apart)), SPLITS)
    left = [
        f"the {len(names.all()):,} pictures of {split}/" for split in apart if (names := beside[split]).all()
    ]
    noticed = f"{store.path} is tested with {tested}/; {' and '.join(left)} are left out" if left else None
    return Parts(train or {name: [] for name in test}, test, noticed)
