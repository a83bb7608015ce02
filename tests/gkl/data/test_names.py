"""Names that anybody may have written, with newlines, escapes and half surrogates in them: each message that says one is a line that can be printed."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gkl.data import imagenet_lt as long_tailed
from gkl.data.ade20k import ade20k
from gkl.data.content import content
from gkl.data.conversations import read_conversations
from gkl.data.digits import digits
from gkl.data.files import first_of_classes, other_pictures
from gkl.data.generated import class_gaussian
from gkl.data.image_folder import image_files, image_folder
from gkl.data.pairs import Draw, Shards, beside, table
from gkl.data.preparing import prepare
from gkl.data.stores import open_store
from gkl.evaluation.vqa import POPE, TextVQA
from gkl.evaluation.vqa_files import check_annotated, check_asked, check_once, read_answers, read_questions
from gkl.lines import one_line
from gkl.models.checkpoints import load_checkpoint
from tests.gkl.data.test_files import write_lists
from tests.gkl.data.test_layout import marked, picture, put, zipped
from trainers.errors import ConfigError

NAME = "cla\ns\r\x1b[31m\t\u2028\x07\udc80"  # of a file, which has no NUL
IN_ZIP = NAME[:-1]  # whose names are UTF-8


def test_a_line_says_which_characters_it_hides() -> None:
    assert one_line(f"{NAME}\0é") == r"cla\ns\r\x1b[31m\t\u2028\x07\udc80\x00é"
    assert one_line(one_line(NAME)) == one_line(NAME) and one_line(Path("a b")) == "a b"
    assert str(ConfigError(f"no class {NAME}")) == f"no class {one_line(NAME)}"


def laid(folder: Path, *names: str, data: bytes | None = None) -> Path:
    """train/cat, val/cat and files of further names, pictures where nothing else is said."""
    for name in ("train/cat/0.png", "val/cat/0.png"):
        put(folder / name, picture(0))
    for name in names:
        put(folder / name, picture(0) if data is None else data)
    return folder


def empty(folder: Path) -> Path:
    (laid(folder) / "train" / NAME).mkdir()
    return folder


def read_at(folder: Path) -> None:
    image_files(str(laid(folder, f"train/cat/{NAME}.png", data=b"none")), 8, 8).train.read(1, "pillow")


def untaken(folder: Path) -> None:
    store = open_store(laid(folder))
    first_of_classes(store, [NAME], {NAME: []}, [1])


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def encrypted(folder: Path) -> None:
    archive = zipped(laid(folder, f"train/cat/{IN_ZIP}.png"), folder.parent / "packed")
    marked(archive, f"{folder.name}/train/cat/{IN_ZIP}.png", flags=1)
    image_files(str(archive), 8, 8)


def lone_class_in_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for name in ("train/cat/0.png", f"train/{IN_ZIP}/0.png", "val/cat/0.png"):
            archive.writestr(name, picture(0))
    image_files(str(folder.with_suffix(".zip")), 8, 8)


def in_shards(name: str = "train.tar", **members: bytes) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        folder.mkdir()
        shard(folder / "val.tar", {"0.png": picture(0), "0.cls": b"0"})
        shard(folder / name, {n: data for n, data in members.items()})
        image_files(str(folder), 8, 8)

    return read


def damaged_shard(folder: Path) -> None:
    put(folder / f"train{NAME}.tar", b"no tar" * 200)
    image_files(str(folder), 8, 8)


def one_of_a_class(folder: Path) -> None:
    data = digits()
    few = replace(
        data, class_names=(NAME, *data.class_names[1:]), train_labels=data.train_labels.clamp(min=1)
    )
    few.train_labels[0] = 0
    class_gaussian(few, 10)


def unlisted(folder: Path) -> None:
    write_lists(laid(folder), [1] * 1000, 1)
    train = folder / "ImageNet_LT_train.txt"
    train.write_text(
        train.read_text().replace("train0_0", "\x1b[31m\t\0")
    )  # a line of a list ends at what ends lines
    long_tailed.imagenet_lt(str(folder), str(folder))


def in_table(column: str, name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        put(folder / "pairs.csv", f'"{column}","title"\r\n"{name}","a cat"\r\n'.encode())
        table(folder / "pairs.csv", ",", "filepath", "title")

    return read


def captioned(*names: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        for name in names:
            put(folder / name, b"\xff" if name.endswith(".txt") else picture(0))
        beside(folder)

    return read


def no_pair(folder: Path) -> None:
    folder.mkdir()
    shard(folder / f"{NAME}.tar", {"0.png": b"none", "1.txt": b"a cat"})
    Shards(folder, 1, 1, 1, "pillow")


def no_pair_decoded(folder: Path) -> None:
    folder.mkdir()
    shard(folder / f"{NAME}.tar", {"0.png": b"none", "0.txt": b"a cat"})
    Shards(folder, 1, 1, 1, "pillow").take(Draw(0, 0), [0], 1, 0, 1)


def shard_gone_bad(folder: Path) -> None:
    folder.mkdir()
    at = shard(folder / f"{NAME}.tar", {"0.png": b"none", "0.txt": b"a cat"})
    shards = Shards(folder, 1, 1, 1, "pillow")
    at.write_bytes(b"no tar" * 200)
    shards.take(Draw(0, 0), [0], 1, 0, 1)


def conversation(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    put(folder / "talk.json", json.dumps([{"image": f"{NAME}\0", "conversations": turns}]).encode())
    read_conversations(folder / "talk.json", ())


def mapped(*names: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        for name in names:
            put(folder / name, picture(0))
        ade20k(str(folder))

    return read


def pipe(folder: Path) -> None:
    os.mkfifo(laid(folder) / NAME)
    content(folder)


def into_itself(folder: Path) -> None:
    os.symlink(laid(folder), folder / NAME)
    content(folder)


def gone(folder: Path) -> None:
    os.symlink("nowhere", laid(folder) / NAME)
    content(folder)


def long_header(folder: Path) -> None:
    put(folder / "part.npz")
    shape = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (1, 8, 8, 3), }}{' ' * 20_000}\n".encode()
    head = np.lib.format.magic(1, 0) + len(shape).to_bytes(2, "little") + shape
    with zipfile.ZipFile(folder / "part.npz", "w") as archive:
        for name in ("image.npy", "label.npy"):
            archive.writestr(name, head + bytes(192))
    prepare([folder / "part.npz"], folder / "prepared", 10)


def asked(folder: Path, *questions: dict[str, Any]) -> Path:
    put(folder / "asked.jsonl", "".join(f"{json.dumps(q)}\n" for q in questions).encode())
    return folder / "asked.jsonl"


QUESTION = {"question_id": NAME, "image": "0.jpg", "text": f"{NAME}\nshort"}


def answered(folder: Path) -> None:
    questions = read_questions(asked(folder, QUESTION))
    read_answers(asked(folder, {**QUESTION, "prompt": "x"}), questions)


def annotated(folder: Path, **row: Any) -> None:
    row = {"image_id": "0", "question": NAME, "question_id": NAME, **row}
    put(folder / "annotated.json", json.dumps({"data": [row]}).encode())
    TextVQA.read(asked(folder, {**QUESTION, "text": NAME.replace("\n", "")}), folder / "annotated.json")


def other_tensors(folder: Path) -> None:
    folder.mkdir()
    torch.save({NAME: torch.zeros(1), f"{NAME}.weight": torch.zeros(2, 2)}, folder / "net.pt")
    load_checkpoint(torch.nn.Linear(2, 3), folder / "net.pt")


def several_networks(folder: Path) -> None:
    folder.mkdir()
    torch.save({f"{NAME}{n}": {"weight": torch.zeros(1)} for n in range(2)}, folder / "net.pt")
    load_checkpoint(torch.nn.Linear(2, 3), folder / "net.pt")


READERS: dict[str, Callable[[Path], object]] = {
    "a class of one part": lambda f: image_files(str(laid(f, f"train/{NAME}/0.png")), 8, 8),
    "a class of one part, in memory": lambda f: image_folder(str(laid(f, f"train/{NAME}/0.png")), 8),
    "a class of one part, in a zip": lone_class_in_zip,
    "a picture that is too deep": lambda f: image_files(str(laid(f, f"train/cat/{NAME}/0.png")), 8, 8),
    "a picture of no class": lambda f: image_files(str(laid(f, f"train/{NAME}.png")), 8, 8),
    "an ending that is not read": lambda f: image_files(str(laid(f, f"train/cat/{NAME}.heic")), 8, 8),
    "an empty class": lambda f: image_files(str(empty(f)), 8, 8),
    "two roots": lambda f: image_files(str(laid(f, f"{NAME}/train/cat/0.png")), 8, 8),
    "a damaged picture": read_at,
    "a damaged picture, in memory": lambda f: image_folder(
        str(laid(f, f"train/cat/{NAME}.png", data=b"none")), 8
    ),
    "a class of too few": untaken,
    "a class that is not known": lambda f: other_pictures(laid(f, f"train/{NAME}/0.png") / "train", ("cat",)),
    "an encrypted picture": encrypted,
    "a shard's picture without a class": in_shards(**{f"{NAME}.png": picture(0)}),
    "a shard's two pictures": in_shards(**{f"{NAME}.png": picture(0), f"{NAME}.jpg": picture(0)}),
    "a shard's picture that is not read": in_shards(**{f"{NAME}.heic": b"x"}),
    "a shard's class that is none": in_shards(**{f"{NAME}.cls": NAME.encode(errors="surrogateescape")}),
    "a shard of such a name": in_shards(f"train{NAME}.tar", **{"0.png": picture(0)}),
    "a damaged shard": damaged_shard,
    "a class without a Gaussian": one_of_a_class,
    "a list's picture that is not there": unlisted,
    "a table's column": in_table(NAME[:-1].replace("\u2028", ""), "0.png"),
    "a table's picture": in_table("filepath", NAME[:-1]),
    "a picture without a caption": captioned(f"{NAME}.png"),
    "a caption in no UTF-8": captioned(f"{NAME}.png", f"{NAME}.txt"),
    "a shard without a pair": no_pair,
    "a shard without a pair that can be decoded": no_pair_decoded,
    "a shard that has gone bad": shard_gone_bad,
    "a conversation's picture": conversation,
    "a picture without its label map": mapped(f"images/training/{NAME}.png"),
    "a label map that is none": mapped(
        *(f"{kind}/{part}/{NAME}.png" for kind in ("images", "annotations") for part in ("training", "validation"))
    ),
    "a pipe": pipe,
    "a link into itself": into_itself,
    "a link to nowhere": gone,
    "numpy's lines": long_header,
    "a question without an answer": answered,
    "a question asked twice": lambda f: check_once(f, [NAME, NAME]),
    "a question that is not known": lambda f: check_annotated(f, f, [NAME], {}),
    "a question that is not asked": lambda f: check_asked(f, f, [], {NAME: 0}),
    "a question without people's answers": annotated,
    "a question without its lines": lambda f: annotated(f, answers=[""] * 10),
    "a category": lambda f: POPE.read(asked(f, {**QUESTION, "category": NAME}), {}),
    "tensors of other names": other_tensors,
    "several networks": several_networks,
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_a_message_is_one_printable_line_whatever_the_name(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_tailed, "LISTS", dict.fromkeys(long_tailed.LISTS, 1000))
    monkeypatch.setattr(long_tailed, "PROFILE", (0, 0, 1000))
    with pytest.raises(ValueError) as caught:
        READERS[reader](tmp_path / "data")
    assert str(caught.value).isprintable() and len(str(caught.value)) > 40, str(caught.value)
    if reader != "numpy's lines":
        assert r"\x1b" in str(caught.value), "it says the name"
