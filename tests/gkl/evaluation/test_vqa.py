"""TextVQA, GQA and POPE: scores known from the definition, LLaVA's own evaluation beside ours, and files that do not fit."""

import ast
import contextlib
import importlib.util
import io
import json
import os
import random
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gkl.evaluation.vqa import GQA, POPE, TextVQA, says_yes
from gkl.evaluation.vqa_files import read_answers, read_questions, write_answers
from gkl.evaluation.vqa_words import CONTRACTIONS, normalised

CLOSING = "Answer the question using a single word or phrase."
LLAVA = pytest.mark.skipif("LLAVA_REF" not in os.environ, reason="needs LLAVA_REF, a checkout of LLaVA")


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_vqa(folder: Path, given: Sequence[Sequence[str]]) -> dict[str, Path]:
    rows = [
        {"question_id": 34600 + n, "image_id": f"p{n // 2}", "question": f"What IS {n}?", "answers": answers}
        for n, answers in enumerate(given)
    ]
    asked = [
        {
            "question_id": row["image_id"],
            "image": f"{row['image_id']}.jpg",
            "text": f"{row['question']}\nReference OCR token: STOP, {n}\n{CLOSING}",
        }
        for n, row in enumerate(rows)
    ]
    (folder / "val.json").write_text(json.dumps({"data": rows}))
    return {"questions": lines(folder / "asked.jsonl", asked), "annotations": folder / "val.json"}


TEN = [
    ["stop"] * n + ["go", "wait", "left", "right", "up", "down", "in", "out", "on", "off"][n:]
    for n in range(6)
]


def test_text_vqa_of_one_to_five_of_ten_people(tmp_path: Path) -> None:
    """n of 10 people: over the ten choices of nine, the mean of min(1, agreeing / 3), which is 0.3 n up to 3, then 1."""
    benchmark = TextVQA.read(**text_vqa(tmp_path, TEN))
    one_each = [
        benchmark.__class__(benchmark.questions[n : n + 1], benchmark.given[n : n + 1], [0]) for n in range(6)
    ]
    scores = [single.score(["STOP."])["textvqa"] for single in one_each]
    assert scores == pytest.approx([0, 30, 60, 90, 100, 100])
    assert benchmark.score(["the Stop"] * 6)["textvqa"] == pytest.approx(380 / 6)


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The Coca-Cola, two cans.", "coca cola 2 cans"),  # a hyphen within words is a space
        ("well - known", "well known"),  # beside a space it goes, everywhere
        ("none", "0"),
        ("dont", "don't"),
        ("it's", "it 's"),
        ("3.5", "3.5"),
        ("v2.", "v2"),
        ("a.m", "am"),
        ("1,000", "1000"),
        ("line\nbreak\ttab", "line break tab"),
        ("an apple a day", "apple day"),
    ],
)  # fmt: skip
def test_answers_as_they_are_compared(said: str, compared: str) -> None:
    assert normalised(said) == compared


def test_text_vqa_is_joined_by_picture_and_question_and_uploaded_with_its_numbers(tmp_path: Path) -> None:
    files = text_vqa(tmp_path, [["a b"] * 10, ["c"] * 10, ["d"] * 10])
    rows = files["questions"].read_text().splitlines()
    files["questions"].write_text("\n".join(reversed(rows)))
    benchmark = TextVQA.read(**files)
    assert benchmark.score(["d", "c", "b"])["textvqa"] == pytest.approx(100.0), "the article a does not count"
    benchmark.upload(tmp_path / "up.json", ["d", "c", "b"])
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"question_id": 34602, "image_id": "p1", "answer": "d"},
        {"question_id": 34601, "image_id": "p0", "answer": "c"},
        {"question_id": 34600, "image_id": "p0", "answer": "b"},
    ]


def gqa(folder: Path, kinds: Sequence[tuple[str, str]]) -> dict[str, Path]:
    rows = {
        f"2{n:03d}": {"answer": answer, "types": {"structural": kind}, "isBalanced": True}
        for n, (kind, answer) in enumerate(kinds)
    }
    asked = [{"question_id": n, "image": f"n{n}.jpg", "text": f"{n}?\n{CLOSING}"} for n in reversed(rows)]
    (folder / "testdev.json").write_text(
        json.dumps({"1999": {"answer": "no", "types": {"structural": "verify"}, "isBalanced": False}} | rows)
    )
    return {"questions": lines(folder / "asked.jsonl", asked), "annotations": folder / "testdev.json"}


GQA_KINDS = [("query", "red"), ("query", "left"), ("verify", "yes"), ("choose", "cat"), ("logical", "no")]


def test_gqa_over_all_questions_and_by_kind(tmp_path: Path) -> None:
    benchmark = GQA.read(**gqa(tmp_path, GQA_KINDS))
    said = ["No.", "cat", "Yes", "to the left", "RED"]  # in the question file's order, the last first
    assert benchmark.score(said) == pytest.approx(
        {"gqa_open": 50.0, "gqa_binary": 100.0, "gqa_accuracy": 80.0}
    )
    benchmark.upload(tmp_path / "up.json", said)
    assert json.loads((tmp_path / "up.json").read_text())[0] == {"questionId": "2004", "prediction": "no"}


def pope(folder: Path, labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Things 0, 1, ... of which each picture has two questions."""
    asked, files = [], {}
    for number, (category, said) in enumerate(labels.items()):
        rows = [
            {
                "question_id": n + 1,
                "image": f"{n // 2}.jpg",
                "text": f"Is there a thing{n} in the image?",
                "label": label,
            }
            for n, label in enumerate(said)
        ]
        files[category] = lines(folder / f"coco_pope_{category}.json", rows)
        asked += [
            {"question_id": 10_000_000 * number + row["question_id"], "image": row["image"],
             "text": f"{row['text']}\n{CLOSING}", "category": category}
            for row in rows
        ]  # fmt: skip
    return {"questions": lines(folder / "asked.jsonl", asked), "annotations": files}


LABELS = {
    "random": "yes no yes no".split(),
    "popular": "yes yes no no".split(),
    "adversarial": "no no no yes".split(),
}
SAID = [
    "Yes",
    "No",
    "no.",
    "Yes, there is. Not that",
    "Yes",
    "Yes",
    "No",
    "there is not",
    "yes",
    "no",
    "no",
    "Yes",
]


def test_pope_by_category_and_their_mean(tmp_path: Path) -> None:
    scores = POPE.read(**pope(tmp_path, LABELS)).score(SAID)
    # random: 1 found, 1 missed, 1 false alarm; popular: all right; adversarial: 1 found, 1 false alarm
    wanted = {
        "random": (50.0, 50.0, 50.0, 50.0, 50.0),
        "popular": (100.0, 100.0, 100.0, 100.0, 50.0),
        "adversarial": (200 / 3, 75.0, 50.0, 100.0, 50.0),
    }
    for category, values in wanted.items():
        names = ("", "_accuracy", "_precision", "_recall", "_yes")
        assert [scores[f"pope_{category}{name}"] for name in names] == pytest.approx(values), category
    assert scores["pope_mean_f1"] == pytest.approx((50 + 100 + 200 / 3) / 3)
    assert scores["pope_mean_accuracy"] == pytest.approx(75.0)


def test_pope_of_one_answer_to_everything_has_measures(tmp_path: Path) -> None:
    scores = POPE.read(**pope(tmp_path, LABELS)).score(["No"] * 12)
    assert (scores["pope_random"], scores["pope_random_precision"], scores["pope_random_accuracy"]) == (
        0,
        0,
        50,
    )


def test_pope_scores_the_same_by_either_version_of_the_annotations(tmp_path: Path) -> None:
    """The newer list has more questions in between, its numbers run on, and a slip of the pen is mended."""
    files = pope(tmp_path, LABELS)
    asked = [json.loads(line) for line in files["questions"].read_text().splitlines()]
    slips = [
        row | {"text": row["text"].replace("thing1 in the image", "thing1 in the imange")} for row in asked
    ]
    older = POPE.read(lines(tmp_path / "older.jsonl", slips), files["annotations"])
    newer = [json.loads(line) for line in files["annotations"]["random"].read_text().splitlines()]
    newer.insert(1, {"image": "0.jpg", "text": "Is there a bus in the image?", "label": "no"})
    newer = [row | {"question_id": n} for n, row in enumerate(newer, 1)]
    annotations = files["annotations"] | {"random": lines(tmp_path / "coco_pope_random_3000.json", newer)}
    renumbered = POPE.read(files["questions"], annotations)
    assert (
        older.present == renumbered.present == [label == "yes" for said in LABELS.values() for label in said]
    )


@pytest.mark.parametrize(
    ("text", "yes"),
    [("Yes", True), ("No", False), ("no, there is none", False), ("It is not there. Yes", False), ("NO", True), ("", True),
     ("There is nothing", True), ("Yes. No", True), ("No\nbody", True)],
)  # fmt: skip
def test_what_counts_as_yes(text: str, yes: bool) -> None:
    assert says_yes(text) == yes


def test_answers_come_back_by_question_whatever_their_order(tmp_path: Path) -> None:
    questions = read_questions(text_vqa(tmp_path, TEN)["questions"])
    write_answers(tmp_path / "said.jsonl", questions, [f"é{n}" for n in range(6)], model="tiny")
    rows = (tmp_path / "said.jsonl").read_text().splitlines()
    (tmp_path / "said.jsonl").write_text("\n".join(sorted(rows, key=hash)))
    assert read_answers(tmp_path / "said.jsonl", questions) == [f"é{n}" for n in range(6)]


def test_answers_missing_twice_or_to_other_questions_are_one_line(tmp_path: Path) -> None:
    questions = read_questions(gqa(tmp_path, GQA_KINDS)["questions"])
    said = tmp_path / "said.jsonl"
    for chosen, message in (
        (
            questions[1:],
            r"5 questions, got 1 without an answer \(such as 2004\); give it the file it answers",
        ),
        ([*questions, questions[0]], r"1 answered twice \(such as 2004\)"),
    ):
        write_answers(said, chosen, ["yes"] * len(chosen))
        with pytest.raises(ValueError, match=message):
            read_answers(said, questions)
    with pytest.raises(
        ValueError, match=r"4 questions, got 1 answered twice .*, 1 that are not asked \(such as 2000"
    ):
        read_answers(said, questions[:4])


@pytest.mark.parametrize("broken", ["asked.jsonl", "testdev.json"])
def test_gqa_of_another_version_is_one_line_before_a_model_is_asked(tmp_path: Path, broken: str) -> None:
    files = gqa(tmp_path, GQA_KINDS)
    kept = files["questions"].read_text(), files["annotations"].read_text()
    if broken == "asked.jsonl":
        files["questions"].write_text(kept[0].replace('"2004"', '"2005"'))
        message = r"asked.jsonl has 1 of 5 questions that .*testdev.json does not know, such as 2005; take both of one version"
    else:
        files["questions"].write_text(kept[0].split("\n", 1)[1])
        message = r"testdev.json has 1 of 5 questions that .*asked.jsonl does not ask after, such as 2004; take both of one version"
    with pytest.raises(ValueError, match=message):
        GQA.read(**files)
    files["questions"].write_text(kept[0] + kept[0].split("\n")[0])
    with pytest.raises(ValueError, match=r"asks 1 questions more than once, such as 2004"):
        GQA.read(**files)
    files["annotations"].write_text(kept[1].replace('"structural"', '"kind"'))
    with pytest.raises(
        ValueError, match=r"testdev.json needs answer, types.structural and isBalanced under each"
    ):
        GQA.read(**files)


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    files = text_vqa(tmp_path, [["a"] * 9])
    with pytest.raises(ValueError, match=r"val.json: question 34600 needs 10 answers by people, got \['a'"):
        TextVQA.read(**files)
    files = text_vqa(tmp_path, TEN)
    asked = files["questions"].read_text()
    files["questions"].write_text(asked.replace("IS 3", "IS 9"))
    with pytest.raises(
        ValueError, match=r"1 of 6 questions that .* does not know, such as \('p1', 'what is 9\?'\)"
    ):
        TextVQA.read(**files)
    files["questions"].write_text(asked.replace("Reference OCR token: ", ""))
    with pytest.raises(
        ValueError, match="question p0 needs the lines question, Reference OCR token and instruction"
    ):
        TextVQA.read(**files)
    files["questions"].write_text(asked + "{")
    with pytest.raises(ValueError, match=r"asked.jsonl, line 7 needs a JSON object, got '\{'"):
        TextVQA.read(**files)
    files["questions"].write_text(asked + '{"question_id": 1}')
    with pytest.raises(
        ValueError, match=r"asked.jsonl, question 7 needs question_id, image, text, got \{'question_id': 1\}"
    ):
        TextVQA.read(**files)
    files["questions"].write_text(asked.replace('"p1.jpg"', "1"))
    with pytest.raises(ValueError, match="asked.jsonl, question 3 needs question_id, image, text, got"):
        TextVQA.read(**files)
    files["questions"].write_text("\n")
    with pytest.raises(ValueError, match="asked.jsonl needs a question a line, got none"):
        TextVQA.read(**files)
    files["questions"].write_text(asked)
    with pytest.raises(
        FileNotFoundError, match="no file of questions, annotations or answers at .*gone.json; fetch it"
    ):
        TextVQA.read(files["questions"], tmp_path / "gone.json")
    for data, message in (
        (b'{"data": [', "val.json is no whole JSON file"),
        (b"[]", "val.json needs a list of questions under data, got list"),
        (b"\xff", "val.json is no text in UTF-8"),
    ):
        files["annotations"].write_bytes(data)
        with pytest.raises(ValueError, match=message):
            TextVQA.read(**files)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_questions(tmp_path)


def test_pope_without_a_category_or_a_question_is_one_line(tmp_path: Path) -> None:
    files = pope(tmp_path, LABELS)
    with pytest.raises(
        ValueError, match="categories popular, random, and of no other; it differs in adversarial"
    ):
        POPE.read(files["questions"], {c: files["annotations"][c] for c in ("random", "popular")})
    text = files["annotations"]["random"].read_text()
    files["annotations"]["random"].write_text(text.split("\n", 1)[1])
    with pytest.raises(ValueError, match=r"1 of 12 questions that .*coco_pope_random.json.* does not know"):
        POPE.read(**files)
    files["annotations"]["random"].write_text(text)
    files["questions"].write_text("\n".join(files["questions"].read_text().split("\n")[2:]))
    with pytest.raises(
        ValueError, match=r"has 1 of 6 pictures that .* does not ask after, such as \('random', '0.jpg'\)"
    ):
        POPE.read(**files)
    files["annotations"]["random"].write_text(text.replace('"label": "yes"', '"label": "maybe"'))
    with pytest.raises(ValueError, match="coco_pope_random.json needs labels yes and no, got 'maybe'"):
        POPE.read(**files)


def llava(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of LLaVA's evaluation, which of all that LLaVA needs needs tqdm alone."""
    root = Path(os.environ["LLAVA_REF"]) / "llava/eval"
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=lambda rows: rows))
    for module in ("m4c_evaluator", name):
        spec = importlib.util.spec_from_file_location(f"llava.eval.{module}", root / f"{module}.py")
        assert spec and spec.loader
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"llava.eval.{module}", loaded)
        spec.loader.exec_module(loaded)
    return loaded


def printed(function: Any, *arguments: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        function(*arguments)
    return said.getvalue()


@LLAVA
def test_answers_are_compared_as_llava_does(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = llava("m4c_evaluator", monkeypatch).EvalAIAnswerProcessor()
    pieces = [*" ''.,;-/?!ab1s9", "the ", "two ", "\n", "\t", "let's ", *CONTRACTIONS, *theirs.CONTRACTIONS]
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 9)))
        assert normalised(text) == theirs(text), text


@LLAVA
def test_text_vqa_is_llavas_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    words = ["stop", "Stop.", "the stop", "2", "two", "don't", "dont", "coca-cola", "coca cola"]
    files = text_vqa(tmp_path, [draw.choices(words, k=10) for _ in range(60)])
    benchmark = TextVQA.read(**files)
    texts = draw.choices(words, k=60)
    write_answers(tmp_path / "said.jsonl", benchmark.questions, texts)
    said = printed(
        llava("eval_textvqa", monkeypatch).eval_single, files["annotations"], tmp_path / "said.jsonl"
    )
    assert f"Samples: 60\nAccuracy: {benchmark.score(texts)['textvqa']:.2f}%" in said


@LLAVA
def test_pope_is_llavas_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(2)
    files = pope(tmp_path, {c: draw.choices(["yes", "no"], k=40) for c in LABELS})
    benchmark = POPE.read(**files)
    texts = draw.choices(["Yes", "no", "No, it is", "Yes. not", "there is not", "NO", ""], k=120)
    write_answers(tmp_path / "said.jsonl", benchmark.questions, texts)
    rows, scores = (
        [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()],
        benchmark.score(texts),
    )
    for n, category in enumerate(LABELS):
        said = printed(
            llava("eval_pope", monkeypatch).eval_pope,
            rows[40 * n : 40 * n + 40],
            files["annotations"][category],
        )
        names = ("", "_accuracy", "_precision", "_recall", "_yes")
        assert said.splitlines()[-1] == ", ".join(
            f"{scores[f'pope_{category}{name}'] / 100:.3f}" for name in names
        )


@LLAVA
def test_gqas_predictions_are_llavas_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = GQA.read(**gqa(tmp_path, GQA_KINDS))
    texts = ["No.", "Cat..", "Yes", "to the left", "RED"]
    write_answers(tmp_path / "said.jsonl", benchmark.questions, texts)
    monkeypatch.setattr(
        sys, "argv", ["", "--src", str(tmp_path / "said.jsonl"), "--dst", str(tmp_path / "theirs.json")]
    )
    script = Path(os.environ["LLAVA_REF"]) / "scripts/convert_gqa_for_eval.py"
    exec(compile(ast.parse(script.read_text()), str(script), "exec"), {})
    benchmark.upload(tmp_path / "ours.json", texts)
    assert json.loads((tmp_path / "ours.json").read_text()) == json.loads(
        (tmp_path / "theirs.json").read_text()
    )
