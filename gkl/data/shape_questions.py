"""easy-vqa's coloured shapes (Zhou 2019) with its questions, in the files of LLaVA and of GQA: real question files in a package.

Its test questions are asked in GQA's form: open where the answer is a shape or a colour, binary where it is yes or no.
"""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from gkl.atomic import atomically
from gkl.data.conversation_sets import (
    CAPTIONS,
    CONVERSATIONS,
    PICTURES,
    TEXTS,
    TOLD,
    WORDS,
    llava_data,
    texts,
)
from gkl.data.conversations import SYSTEM
from gkl.data.dialogues import DialogueData
from gkl.data.digit_questions import SHORT, Round, conversation, write_lines, write_text
from gkl.models.language import words_of

SHAPES = ("circle", "rectangle", "triangle")
PLACES = 64


def easy_vqa() -> Any:
    """The package. Raises ValueError where it is not installed."""
    try:
        return import_module("easy_vqa")
    except ModuleNotFoundError as error:
        raise ValueError(
            "the shapes of scale=small are easy-vqa's, which is missing: pip install 'gkl[llava]'"
        ) from error


def shape_questions(
    root: str, caption_epochs: int, caption_batch_size: int | None, epochs: int, image_size: int = 64, patch_size: int = 8, length: int = 256,
    cards: int = 1,
) -> DialogueData:  # fmt: skip
    """What `llava_data` reads, written once below root. Arguments as there."""
    write_shape_questions(Path(root))
    return llava_data(
        root, None, ["gqa"], caption_epochs, caption_batch_size, epochs, image_size, patch_size, length, cards, name="shape_questions"
    )  # fmt: skip


def shape_texts(root: str, told_epochs: int, epochs: int, length: int = 256, cards: int = 1) -> DialogueData:
    """The texts of the same folder, written once."""
    write_shape_questions(Path(root))
    return texts(root, None, told_epochs, epochs, length, cards, name="shape_texts")


def write_shape_questions(root: Path) -> None:
    """All files below root, whole or not at all: several runs may start at once."""
    if root.is_dir():
        return
    try:
        with atomically(root) as temporary:
            _write(temporary)
    except OSError:
        if not root.is_dir():  # else another run was first
            raise


def by_picture(questions: Sequence[Sequence[Any]]) -> dict[int, list[Round]]:
    """Questions and answers of each picture. questions: the package's lists of questions, answers, pictures."""
    found: dict[int, list[Round]] = {}
    for question, answer, picture in zip(*questions, strict=True):
        found.setdefault(picture, []).append((f"{question}\n{SHORT}", answer))
    return found


def seen(rounds: Sequence[Round]) -> str | None:
    """What a picture shows, "a blue circle", where its open questions tell colour and shape."""
    open_answers = {answer for _, answer in rounds} - {"yes", "no"}
    shape = [a for a in open_answers if a in SHAPES]
    colour = [a for a in open_answers if a not in SHAPES]
    return f"a {colour[0]} {shape[0]}" if shape and colour else None


def _write(root: Path) -> None:
    package = easy_vqa()
    train, test = by_picture(package.get_train_questions()), by_picture(package.get_test_questions())
    files: Mapping[int, str] = package.get_train_image_paths()
    said = [
        SYSTEM,
        "USER: ASSISTANT:",
        *(text for rounds in (*train.values(), *test.values()) for r in rounds for text in r),
    ]
    captions, mix, plain, told = [], [], [], []
    draw = random.Random(0)
    (root / PICTURES).mkdir(parents=True)
    for number, rounds in sorted(train.items()):
        shutil.copy(files[number], root / PICTURES / f"{number}.png")
        mix.append(conversation(number, "<image>", rounds, image=f"{PICTURES}/{number}.png"))
        if shown := seen(rounds):
            said.append(shown)
            captions.append(
                conversation(number, "<image>", [("describe the image.", shown)], image=f"{number}.png")
            )
            words = " ".join(shown.split()[1:] * (PLACES // 2))
            plain += [conversation(number, words, [draw.choice(rounds)])]
            told += [conversation(number, "", [("", f"{words} {shown}")])]
    for name, rows in ((CAPTIONS, captions), (CONVERSATIONS, mix), (TEXTS, plain), (TOLD, told)):
        write_text(root / name, json.dumps(rows))
    write_text(root / WORDS, "".join(f"{word}\n" for word in words_of([*said, "describe the image."])))
    pictures: Mapping[int, str] = package.get_test_image_paths()
    (root / "eval/gqa/data/images").mkdir(parents=True)
    asked: list[dict[str, Any]] = []
    answers: dict[str, Any] = {}
    for number, rounds in sorted(test.items()):
        shutil.copy(pictures[number], root / "eval/gqa/data/images" / f"{number}.png")
        for question, answer in rounds:
            key = f"{len(asked):06d}"
            asked.append({"question_id": key, "image": f"{number}.png", "text": question})
            kind = "verify" if answer in ("yes", "no") else "query"
            answers[key] = {"answer": answer, "isBalanced": True, "types": {"structural": kind}}
    write_lines(root / "eval/gqa/llava_gqa_testdev_balanced.jsonl", asked)
    write_text(root / "eval/gqa/data/testdev_balanced_questions.json", json.dumps(answers))
