"""scikit-learn's digits with captions, conversations and questions, in the files of LLaVA and of its benchmarks.

They stand in for LLaVA's data. Texts that say what a scan shows, in its place, are what a small language model learns from first.
"""

import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from gkl.atomic import atomically
from gkl.data.conversation_sets import (
    CAPTIONS,
    CONVERSATIONS,
    MM_DEV,
    MM_DEV_CN,
    PICTURES,
    POPE_CATEGORIES,
    TEXTS,
    TOLD,
    WORDS,
    Name,
    llava_data,
    texts,
)
from gkl.data.conversations import SYSTEM
from gkl.data.dialogues import DialogueData
from gkl.data.digits import digits
from gkl.data.tokens import DIGITS
from gkl.evaluation.mmbench import CLOSING, CLOSING_CN, LETTERS, ROUND
from gkl.models.language import words_of

SHORT = "Answer the question using a single word or phrase."
ALIKE = {
    0: 6,
    1: 7,
    2: 3,
    3: 8,
    4: 9,
    5: 6,
    6: 5,
    7: 1,
    8: 3,
    9: 4,
}  # what POPE's adversarial category asks after
POPULAR = (1, 3, 7)
TIMES = (
    1,
    1,
    1,
    4,
    4,
    4,
)  # that each kind is asked: words are compared in the later ones, which takes longer to learn
TOLD_TEXTS = 640
Round = tuple[str, str]


def open_question() -> str:
    """Of GQA's kind."""
    return f"which digit is this?\n{SHORT}"


def text_question() -> str:
    """Of TextVQA's kind."""
    return f"what is written here?\nReference OCR token: \n{SHORT}"


def even_question() -> str:
    """Of GQA's binary kind."""
    return f"is the digit even?\n{SHORT}"


def there_question(digit: int) -> str:
    """Of POPE's kind."""
    return f"is there a {DIGITS[digit]} in the image?\n{SHORT}"


def choice_question(options: Sequence[int], chinese: bool) -> str:
    """Of MMBench's kind."""
    lines = [f"{letter}. {DIGITS[digit]}" for letter, digit in zip(LETTERS, options, strict=True)]
    first, last = ("这是哪个数字?", CLOSING_CN) if chinese else ("which digit is it?", CLOSING)
    return "\n".join([first, *lines, last])


def options_of(digit: int, draw: random.Random) -> list[int]:
    """The right one among three others, in an order that is drawn."""
    found = [digit, *draw.sample([d for d in range(10) if d != digit], 3)]
    draw.shuffle(found)
    return found


def rounds_of(digit: int, draw: random.Random, count: int) -> list[Round]:
    """Questions of different kinds about a digit, with their answers."""
    other = draw.choice([d for d in range(10) if d != digit])
    asked = digit if draw.random() < 0.5 else other
    options, chinese = options_of(digit, draw), options_of(digit, draw)
    every = [
        (open_question(), DIGITS[digit]),
        (text_question(), DIGITS[digit]),
        (even_question(), "no" if digit % 2 else "yes"),
        (there_question(asked), "yes" if asked == digit else "no"),
        (choice_question(options, False), LETTERS[options.index(digit)]),
        (choice_question(chinese, True), LETTERS[chinese.index(digit)]),
    ]
    kinds: dict[int, Round] = {}
    while len(kinds) < count:
        (kind,) = draw.choices(range(len(every)), TIMES)
        kinds.setdefault(kind, every[kind])
    return list(kinds.values())


def conversation(number: int, first: str, rounds: Sequence[Round], **more: Any) -> dict[str, Any]:
    """A row of LLaVA's file. first: what stands before the first question."""
    turns = []
    for place, (question, answer) in enumerate(rounds):
        turns += [{"from": "human", "value": f"{first}\n{question}" if not place else question}]
        turns += [{"from": "gpt", "value": answer}]
    return {"id": str(number), **more, "conversations": turns}


def write_digit_questions(root: Path, places: int, count: int = 5600, seed: int = 0) -> None:
    """All files below root, whole or not at all: several runs may start at once. places: that a picture takes among words."""
    if root.is_dir():
        return
    try:
        with atomically(root) as temporary:
            _write(temporary, places, count, random.Random(seed))
    except OSError:
        if not root.is_dir():  # else another run was first
            raise


def _write(root: Path, places: int, count: int, draw: random.Random) -> None:
    data = digits()
    said: list[str] = [SYSTEM, "USER: ASSISTANT:"]

    def keep(name: str, rows: list[dict[str, Any]]) -> None:
        said.extend(turn["value"].replace("<image>", "") for row in rows for turn in row["conversations"])
        write_json(root / name, rows)

    pictures = [f"{label}/{n:04d}.png" for n, label in enumerate(data.train_labels.tolist())]
    for image, name in zip(data.train_images, pictures, strict=True):
        _picture(image, root / PICTURES / name)
    labels = data.train_labels.tolist()
    keep(
        CAPTIONS,
        [
            conversation(n, "<image>", [("describe the image.", f"the digit {DIGITS[label]}")], image=name)
            for n, (label, name) in enumerate(zip(labels, pictures, strict=True))
        ],
    )
    keep(
        CONVERSATIONS,
        [
            conversation(n, "<image>", rounds_of(label, draw, 1), image=f"{PICTURES}/{name}")
            for n, (label, name) in enumerate(zip(labels, pictures, strict=True))
        ],
    )
    rows = []
    for number in range(count):
        digit = draw.randrange(10)
        rows.append(conversation(number, " ".join([DIGITS[digit]] * places), rounds_of(digit, draw, 1)))
    keep(TEXTS, rows)
    told = [" ".join([word] * places + ["the digit", word]) for word in DIGITS]
    keep(TOLD, [conversation(n, "", [("", told[n % 10])]) for n in range(TOLD_TEXTS)])
    said.extend(_write_questions(root / "eval", data.test_images, data.test_labels.tolist(), draw))
    write_text(root / WORDS, "".join(f"{word}\n" for word in words_of([*said, *DIGITS])))


def _write_questions(root: Path, images: Tensor, labels: Sequence[int], draw: random.Random) -> Iterator[str]:
    """The benchmarks' files below eval/; gives all kinds of questions."""
    scans = [(f"{n:04d}.png", digit) for n, digit in enumerate(labels)]
    for folder in ("textvqa/train_images", "gqa/data/images", "pope/val2014"):
        for image, (name, _) in zip(images, scans, strict=True):
            _picture(image, root / folder / name)
    _write_textvqa(root / "textvqa", scans)
    _write_gqa(root / "gqa", scans)
    _write_pope(root / "pope", scans, draw)
    for name, chinese in ((MM_DEV, False), (MM_DEV_CN, True)):
        _write_mmbench(root.parent / name, scans, images, chinese, draw)
    yield from (choice_question(range(4), chinese) for chinese in (False, True))
    yield from (text_question(), open_question(), even_question(), there_question(0))


Scans = Sequence[tuple[str, int]]  # a picture's file and its digit


def _write_textvqa(root: Path, scans: Scans) -> None:
    """Each scan once; ten people agree."""
    bare = text_question().split("\n")[0]
    asked = [{"question_id": name[:-4], "image": name, "text": text_question()} for name, _ in scans]
    given = [
        {"image_id": name[:-4], "question": bare, "question_id": number, "answers": [DIGITS[digit]] * 10}
        for number, (name, digit) in enumerate(scans)
    ]
    write_lines(root / "llava_textvqa_val_v051_ocr.jsonl", asked)
    write_json(root / "TextVQA_0.5.1_val.json", {"data": given})


def _write_gqa(root: Path, scans: Scans) -> None:
    """Every other scan by a question of two answers, the ones between by an open one."""
    asked, answers = [], {}
    for number, (name, digit) in enumerate(scans):
        binary, key = number % 2 == 0, f"{number:06d}"
        text = even_question() if binary else open_question()
        right = ("no" if digit % 2 else "yes") if binary else DIGITS[digit]
        kind = "verify" if binary else "query"
        asked.append({"question_id": key, "image": name, "text": text})
        answers[key] = {"answer": right, "isBalanced": True, "types": {"structural": kind}}
    write_lines(root / "llava_gqa_testdev_balanced.jsonl", asked)
    write_json(root / "data/testdev_balanced_questions.json", answers)


def _write_pope(root: Path, scans: Scans, draw: random.Random) -> None:
    """In each category every third scan, asked after its digit and after another."""
    asked: list[dict[str, Any]] = []
    for category in POPE_CATEGORIES:
        rows: list[dict[str, Any]] = []
        for name, digit in scans[:: len(POPE_CATEGORIES)]:
            absent = {
                "adversarial": ALIKE[digit],
                "popular": draw.choice([p for p in POPULAR if p != digit]),
                "random": draw.choice([p for p in range(10) if p != digit]),
            }[category]
            for thing, label in ((digit, "yes"), (absent, "no")):
                text = there_question(thing)
                bare = text.split("\n")[0]
                rows.append({"question_id": len(rows) + 1, "image": name, "text": bare, "label": label})
                asked.append(
                    {"question_id": len(asked) + 1, "image": name, "text": text, "category": category}
                )
        write_lines(root / f"coco/coco_pope_{category}.json", rows)
    write_lines(root / "llava_pope_test.jsonl", asked)


def _write_mmbench(path: Path, scans: Scans, images: Tensor, chinese: bool, draw: random.Random) -> None:
    """Every third scan, in as many rounds as there are options."""
    lines = ["\t".join(["index", "question", "A", "B", "C", "D", "answer", "image", "category"])]
    for number, (_, digit) in list(enumerate(scans))[::3]:
        options = options_of(digit, draw)
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            cells = [
                str(number + turn * ROUND), choice_question(turned, chinese).split("\n")[0], *(DIGITS[o] for o in turned),
                LETTERS[turned.index(digit)], _base64(images[number]), "digit",
            ]  # fmt: skip
            lines.append("\t".join(cells))
    write_text(path, "\n".join(lines) + "\n")


def _picture(image: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def _base64(image: Tensor) -> str:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer := io.BytesIO(), "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(content, ensure_ascii=False))


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write a file with a JSON value a line."""
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_text(path: Path, content: str) -> None:
    """Write a file, its folder first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def digit_questions(
    root: str, asked: Sequence[Name], caption_epochs: int, caption_batch_size: int | None, epochs: int, image_size: int = 8, patch_size: int = 2,
    length: int = 256, cards: int = 1,
) -> DialogueData:  # fmt: skip
    """What `llava_data` reads, written once below root. Arguments as there."""
    write_digit_questions(Path(root), (image_size // patch_size) ** 2)
    return llava_data(
        root, None, asked, caption_epochs, caption_batch_size, epochs, image_size, patch_size, length, cards, name="digit_questions"
    )  # fmt: skip


def digit_texts(
    root: str, told_epochs: int, epochs: int, places: int = 16, length: int = 256, cards: int = 1
) -> DialogueData:
    """The texts of the same folder, written once. places: words in a picture's place."""
    write_digit_questions(Path(root), places)
    return texts(root, None, told_epochs, epochs, length, cards, name="digit_texts")
