"""Tiny-ImageNet: 200 classes of 64 x 64 pixels, in memory or picture by picture, whole or long-tailed."""

from pathlib import Path

from gkl.data.content import check_content
from gkl.data.decoding import Decoder
from gkl.data.files import ImageFiles, first_of_classes, long_tail
from gkl.data.memory import ImageData, in_memory
from gkl.data.stores import Store, open_store


def tiny_imagenet(
    root: str,
    image_size: int = 64,
    classes: int | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    content: str | None = None,
) -> ImageData:
    """Tiny-ImageNet as it is distributed, unpacked or as the zip archive itself: 200 classes; its validation set is test.

    image_size, train_per_class, test_per_class and errors: as in `image_folder`; 64 leaves the pictures as they are.
    classes: only the first so many of them, in the order of their WordNet ids.
    """
    check_content(root, content)
    names, train, test, store = tiny_imagenet_lists(Path(root))
    return in_memory(
        "tiny_imagenet", names[:classes], train, test, store, image_size, train_per_class, test_per_class
    )


def tiny_imagenet_files(
    root: str,
    image_size: int = 64,
    resize: int | None = None,
    decoder: Decoder = "torchvision",
    classes: int | None = None,
    largest: int | None = None,
    smallest: int | None = None,
    many: int = 100,
    few: int = 20,
    content: str | None = None,
) -> ImageFiles:
    """Tiny-ImageNet from its files; with largest and smallest, long-tailed: so many pictures of the first and the last class.

    classes: only the first so many of them, in the order of their WordNet ids. resize: None is image_size. many, few: the
    bounds of the shots.
    """
    check_content(root, content)
    names, train, test, store = tiny_imagenet_lists(Path(root))
    names = names[:classes]
    kept: list[int | None] = [None] * len(names)
    shots = None
    if largest is not None:
        kept, shots = long_tail(len(names), largest, smallest or 1), (many, few)
    parts = (
        first_of_classes(store, names, train, kept),
        first_of_classes(store, names, test, [None] * len(names)),
    )
    name = "tiny_imagenet" if shots is None else "tiny_imagenet_lt"
    return ImageFiles(name, tuple(names), *parts, image_size, resize or image_size, decoder, shots)


def tiny_imagenet_lists(path: Path) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]], Store]:
    """Tiny-ImageNet's classes by WordNet id, its train and validation files by class, and where they lie."""
    store = open_store(
        path, "Tiny-ImageNet", "set data.root=... to tiny-imagenet-200.zip or the folder it holds"
    )
    try:
        top = next(
            Path(f).parents[3]
            for f in store.names
            if Path(f).parts[-2:-1] == ("images",) and "train" in Path(f).parts
        )
        lists = {
            name: store.read(str(top / name)).decode().splitlines()
            for name in ("wnids.txt", "val/val_annotations.txt")
        }
    except (StopIteration, KeyError, OSError):
        raise ValueError(
            f"{path} is not laid out as Tiny-ImageNet (train/<class>/images, val/images, val/val_annotations.txt, wnids.txt)"
        ) from None
    names = sorted(line.strip() for line in lists["wnids.txt"] if line.strip())
    train: dict[str, list[str]] = {c: [] for c in names}
    test: dict[str, list[str]] = {c: [] for c in names}
    for file in store.names:
        parts = Path(file).parts
        if parts[-4:-3] == ("train",) and parts[-3] in train:
            train[parts[-3]].append(file)
    for number, line in enumerate(lists["val/val_annotations.txt"], 1):
        name, label, *_ = (*line.split("\t"), "")
        if not name or label not in test:
            raise ValueError(
                f"{path}: val/val_annotations.txt, line {number} needs a picture and a class of wnids.txt, got {line[:80]!r}"
            )
        test[label].append(str(top / "val" / "images" / name))
    return names, train, test, store
