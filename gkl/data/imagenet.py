"""ImageNet-1k (ILSVRC 2012), read picture by picture."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gkl.data.content import check_same, listing
from gkl.data.decoding import Decoder
from gkl.data.files import ImageFiles
from gkl.data.image_folder import image_files

IMAGENET = {"classes": 1000, "train": 1_281_167, "test": 50_000}


def imagenet(
    root: str,
    image_size: int = 224,
    resize: int = 256,
    decoder: Decoder = "torchvision",
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    content: str | None = None,
) -> ImageFiles:
    """ImageNet-1k (ILSVRC 2012): train/<wnid>/ and val/<wnid>/, or WebDataset shards.

    interpolation: of the test views. content: what gkl.data.content.listing says of root, if they must be those. Other arguments as
    `image_files`.

    Raises ValueError when it is not whole: 1,281,167 training and 50,000 validation pictures of 1,000 classes.
    """
    check_there(root, content)
    data = image_files(root, image_size, resize, decoder, "imagenet")
    found = {"classes": data.num_classes, "train": len(data.train_labels), "test": len(data.test_labels)}
    if found != IMAGENET and found != {**IMAGENET, "train": 0}:  # val/ alone is enough to evaluate
        raise ValueError(
            f"{root} is not the whole of ImageNet: needs {_counts(IMAGENET)}, got {_counts(found)}; complete it, or use "
            "data=image_files for a part of it"
        )
    return replace(data, interpolation=interpolation)


def _counts(found: Mapping[str, int]) -> str:
    return f"{found['train']:,} training and {found['test']:,} validation pictures of {found['classes']:,} classes"


def check_there(root: str, content: str | None) -> None:
    """Raises FileNotFoundError where there is nothing, ValueError where there are other pictures than `content` says."""
    if not Path(root).exists():
        raise FileNotFoundError(
            f"no ImageNet at {root}; put train/<wnid>/ and val/<wnid>/ (or WebDataset shards) there, or set data.root=..."
        )
    check_same(f"the pictures at {root}", content, lambda: listing(root))
