"""CLIP's data as configurations name it: DataComp's shards, any captions, Tiny-ImageNet's names, digits; and ImageNet's tests."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from gkl.data.captions import CaptionData, TestSet
from gkl.data.content import check_content, check_same, hidden, listing
from gkl.data.decoding import Decoder
from gkl.data.digits import digits, digits_files
from gkl.data.files import Split, other_pictures, split
from gkl.data.pairs import Listed, Pairs, Shards, beside, listed_files, named, shards_content, table
from gkl.data.tiny_imagenet import tiny_imagenet_lists
from gkl.data.tokens import (
    DIGIT_TEMPLATES,
    DIGITS,
    Tokenizer,
    Words,
    bpe,
    every_text,
    imagenet_names,
    imagenet_templates,
    templates_of,
)

# root, and below it a folder for each test, None leaves one out; content: what `listing` says of all of them, if they must be those
Folders = Mapping[str, str | None]
CLASSES = {"imagenet_r": 200}  # of a test that has fewer than all


def datacomp(
    root: str, samples: int, lanes: int, shuffle: int, tests: Folders, image_size: int = 224, context_length: int = 77,
    decoder: Decoder = "pillow", content: str | None = None,
) -> CaptionData:  # fmt: skip
    """DataComp-1B, or any WebDataset tars of pictures and captions, see gkl.data.pairs.Shards; tested on ImageNet's own and its like.

    content: what gkl.data.pairs.shards_content says of root, if they must be those.
    """
    check_same(f"the shards at {root}", content, lambda: shards_content(root))
    pairs = Shards(Path(root), samples, lanes, shuffle, decoder)
    return _of_imagenet("datacomp", pairs, bpe(context_length), tests, image_size, decoder)


def imagenet_zero_shot(
    tests: Folders, image_size: int = 224, context_length: int = 77, decoder: Decoder = "pillow"
) -> CaptionData:
    """The tests alone, for a network that is trained already."""
    return _of_imagenet("imagenet_zero_shot", None, bpe(context_length), tests, image_size, decoder)


def caption_files(
    root: str, tests: Folders, image_size: int = 224, context_length: int = 77, tokenizer: Literal["bpe", "words"] = "bpe",
    separator: str | None = None, picture: str = "filepath", caption: str = "title", decoder: Decoder = "pillow", content: str | None = None,
) -> CaptionData:  # fmt: skip
    """Pictures with captions in a CSV or TSV file that names both, or in a folder or zip archive with a .txt beside each picture.

    separator: of the table, a comma in .csv and a tab in .tsv where it is None. picture, caption: its columns, OpenCLIP's. tokenizer: words knows those of the captions and tests.
    content: what gkl.data.content says of root. Raises FileNotFoundError or ValueError naming what is missing.
    """
    check_content(root, content)
    path = Path(root)
    tabular = path.suffix.lower() in (".csv", ".tsv") and path.is_file()
    store, files = (
        table(path, separator or {".csv": ","}.get(path.suffix.lower(), "\t"), picture, caption)
        if tabular
        else beside(path)
    )
    made: Tokenizer
    if tokenizer == "words":
        texts = [text for _, text in files]
        made = Words([*texts, *every_text(imagenet_names(), imagenet_templates())], context_length)
    else:
        made = bpe(context_length)
    return _of_imagenet(path.stem, listed_files(store, files, decoder), made, tests, image_size, decoder)


def _of_imagenet(
    name: str, pairs: Pairs | None, tokenizer: Tokenizer, tests: Folders, image_size: int, decoder: Decoder
) -> CaptionData:
    names, templates = imagenet_names(), imagenet_templates()
    return CaptionData(
        name, pairs, tokenizer, names, templates, imagenet_tests(tests, len(names)), image_size, decoder
    )


def imagenet_tests(folders: Folders, classes: int) -> dict[str, TestSet]:
    """ImageNet's validation pictures (`imagenet`) and what else there is of its classes, each <class>/* with WordNet ids.

    ImageNet-V2 has the classes' places, 0 to 999, for names. classes: how many. Raises ValueError naming what is missing.
    """
    wanted = test_folders(folders)
    if missing := [f"{metric} at {path}" for metric, path in wanted.items() if not path.is_dir()]:
        raise ValueError(
            f"no pictures to test with: {', '.join(missing)}; unpack their class folders there, set data.tests.root=..., or leave one out "
            f"with data.tests.{missing[0].split()[0]}=null"
        )
    if "imagenet" not in wanted:
        raise ValueError(
            "data.tests.imagenet is needed: ImageNet's validation pictures say what the classes are"
        )
    where = f"the pictures to test with below {folders['root']}"
    check_same(where, folders.get("content"), lambda: listing(*wanted.values()))
    ids = _folders(wanted["imagenet"])
    if len(ids) != classes:
        raise ValueError(
            f"{wanted['imagenet']} needs the {classes} class folders of ImageNet's validation pictures, whose order numbers the classes, got "
            f"{len(ids)}"
        )
    found = {}
    for metric, path in wanted.items():
        numbered = all(name.isdecimal() for name in _folders(path))
        class_names = [str(n) for n in range(classes)] if numbered else ids
        found[metric] = TestSet(*other_pictures(path, class_names, CLASSES.get(metric, classes)))
    return found


def test_folders(folders: Folders) -> dict[str, Path]:
    """Where each test's pictures lie, by its metric."""
    root, own = Path(str(folders["root"])), ("root", "content")
    return {metric: root / name for metric, name in folders.items() if metric not in own and name}


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not hidden(p.name))


def tiny_imagenet_captions(
    root: str, image_size: int = 64, context_length: int = 32, decoder: Decoder = "pillow", content: str | None = None
) -> CaptionData:  # fmt: skip
    """Tiny-ImageNet, its 200 classes' names in OpenAI's templates as captions; its validation pictures are the test."""
    check_content(root, content)
    ids, train, test, store = tiny_imagenet_lists(Path(root))
    top = Path(next(file for files in train.values() for file in files)).parents[3]
    try:
        lines = store.read(str(top / "words.txt")).decode().splitlines()
    except (KeyError, OSError):
        raise ValueError(
            f"{root} has no words.txt with the names of its classes; unpack the archive again"
        ) from None
    words = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    names, templates = tuple(words[c].split(",")[0].strip() for c in ids), imagenet_templates()
    parts = [split(store, [(f, k) for k, c in enumerate(ids) for f in files[c]]) for files in (train, test)]
    caption = named(names, parts[0].labels.tolist(), templates)
    digest = hashlib.sha256(b"\n".join(parts[0].names.tolist()) + "\n".join(names).encode()).hexdigest()
    pairs = Listed(len(parts[0].labels), lambda n: parts[0].read(n, decoder), caption, digest)
    tests = {"imagenet": TestSet(parts[1], torch.ones(len(ids), dtype=torch.bool))}
    return CaptionData(
        "tiny_imagenet_captions", pairs, bpe(context_length), names, templates, tests, image_size, decoder
    )


def digits_captions(root: str, image_size: int = 8, context_length: int = 12) -> CaptionData:
    """scikit-learn's digits, each with a sentence that names it; tested on every other test scan.

    The others stand in for ImageNet-V2, and what `digits_files` writes below root for ImageNet-Sketch and ImageNet-R.
    """
    scans, files = digits(), digits_files(root, image_size)
    templates = templates_of(DIGIT_TEMPLATES)
    caption = named(DIGITS, scans.train_labels.tolist(), templates)
    digest = hashlib.sha256("\n".join([scans.sha256, *every_text(DIGITS, templates)]).encode()).hexdigest()
    pairs = Listed(len(scans.train_labels), lambda n: scans.train_images[n], caption, digest)
    every = torch.ones(10, dtype=torch.bool)
    halves = [
        Split(files.test.store, files.test.names[first::2], files.test.labels[first::2]) for first in (0, 1)
    ]
    tests = {
        "imagenet": TestSet(halves[0], every),
        "imagenet_v2": TestSet(halves[1], every),
        "imagenet_sketch": TestSet(*other_pictures(Path(root) / "sketch", files.class_names)),
        "imagenet_r": TestSet(*other_pictures(Path(root) / "renditions", files.class_names)),
    }
    words = Words(every_text(DIGITS, templates), context_length)
    return CaptionData("digits_captions", pairs, words, DIGITS, templates, tests, image_size, "pillow")
