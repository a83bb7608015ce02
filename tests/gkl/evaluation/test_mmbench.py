"""MMBench: its questions as LLaVA asks them, letters from answers, rounds that all must be right, the sheet for its server."""

import ast
import base64
import csv
import os
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gkl.evaluation.mmbench import MMBench, letter
from gkl.evaluation.vqa_files import write_answers

OPTIONS = {"A": "a cat", "B": "a dog", "C": "both of them", "D": "neither"}
COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment", "split",
)  # fmt: skip
PICTURE = base64.b64encode(b"pixels" * 40_000).decode()  # longer than a field of csv may be unless it is told


def row(**given: str) -> dict[str, str]:
    usual = {
        "question": "What is it?",
        "A": "cat",
        "B": "dog",
        "answer": "A",
        "image": PICTURE,
        "split": "dev",
    }
    return dict.fromkeys(COLUMNS, "") | usual | given


def table(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def rounds(number: int, options: str, answer: str) -> list[dict[str, str]]:
    """A question's rounds, its options turned by one each time."""
    found = []
    for turn in range(len(options)):
        turned = options[turn:] + options[:turn]
        cells = {key: f"thing {option}" for key, option in zip("ABCD", turned, strict=False)}
        index = str(number + turn * 1_000_000)
        found.append(row(index=index, answer="ABCD"[turned.index(answer)], **{"B": ""} | cells))
    return found


def test_a_question_as_llava_asks_it(tmp_path: Path) -> None:
    rows = [
        row(index="7", hint="Look, closely\nand again.", A="cat", B="a \"big\" dog", C="None", D="bird"),
        row(index="8", question="谁？", hint="nan", C="-", category="people"),
    ]  # fmt: skip
    english, chinese = (
        MMBench.read(table(tmp_path / "dev.tsv", rows), chinese=chinese) for chinese in (False, True)
    )
    assert english.questions[0].text == (
        "Look, closely\nand again.\nWhat is it?\nA. cat\nB. a \"big\" dog\n"
        "Answer with the option's letter from the given choices directly."
    )  # fmt: skip
    assert chinese.questions[1].text == "谁？\nA. cat\nB. dog\nC. -\n请直接回答选项字母。"
    assert english.questions[1].id == 8 and english.questions[1].category == "people"
    assert english.questions[0].picture == b"pixels" * 40_000


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("B. a dog", "B"),
        ("The answer is: C", "C"),
        (
            "A dog is shown, so the answer must be this",
            None,
        ),  # the article is far from the end, and nothing is named
        ("A or B", None),
        ("E", None),
        ("", None),
        ("b", None),
        ("A Dog", "A"),
        ("it is neither!", "D"),
        ("a cat and a dog", None),
        (
            "It surely is a dog " + "and so on " * 10,
            None,
        ),  # longer than twice the options: no answer but an essay
    ],
)
def test_the_letter_of_an_answer(text: str, named: str | None) -> None:
    assert letter(text, OPTIONS) == named


def test_a_question_counts_where_every_round_is_right(tmp_path: Path) -> None:
    rows = [*rounds(1, "wxyz", "y"), *rounds(2, "uv", "u"), *rounds(3, "uvw", "w")]
    benchmark = MMBench.read(table(tmp_path / "dev.tsv", rows))
    right = [row["answer"] for row in rows]
    assert benchmark.score(right) == {"mmbench": 100.0, "mmbench_vanilla": 100.0}
    always_a = benchmark.score(["A"] * len(rows))
    assert always_a == pytest.approx({"mmbench": 0.0, "mmbench_vanilla": 100 / 3})
    right[5] = "A or B"  # the second round of the second question
    assert benchmark.score(right) == pytest.approx({"mmbench": 200 / 3, "mmbench_vanilla": 100.0})
    assert {*MMBench.read(tmp_path / "dev.tsv", chinese=True).score(right)} == {
        "mmbench_cn",
        "mmbench_cn_vanilla",
    }


def test_without_answers_it_is_uploaded_and_not_scored(tmp_path: Path) -> None:
    benchmark = MMBench.read(
        table(tmp_path / "test.tsv", [row(index="1", answer=""), row(index="2", answer="nan")])
    )
    assert not benchmark.scored_here
    with pytest.raises(
        ValueError, match=r"mmbench has no answers in its file; upload what upload\(\) writes"
    ):
        benchmark.score(["A", "B"])


def test_the_sheet_for_the_server(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    rows = [row(index="1", C="x", D="NA", hint="h"), row(index="1000001", A="=1+1", answer="B")]
    MMBench.read(table(tmp_path / "dev.tsv", rows)).upload(tmp_path / "up.xlsx", ["A", "B\x0b\n"])
    found = list(openpyxl.load_workbook(tmp_path / "up.xlsx").active.iter_rows(values_only=True))
    assert found == [
        ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
        (1, "What is it?", "cat", "dog", "x", None, "A", "A", "dev"),
        (1_000_001, "What is it?", "=1+1", "dog", None, None, "B\n", "B", "dev"),
    ]


def test_without_openpyxl_the_sheet_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    benchmark = MMBench.read(table(tmp_path / "dev.tsv", [row(index="1")]))
    with pytest.raises(
        ModuleNotFoundError,
        match=r"^up.xlsx for MMBench's server needs openpyxl: pip install 'gkl\[llava\]'$",
    ):
        benchmark.upload(tmp_path / "up.xlsx", ["A"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(index="1"), row(index="1")], "asks 1 questions more than once, such as 1"),
        (
            [row(index="1"), row(index="2000002")],
            "later rounds of 1 questions without their first, such as 2; fetch it",
        ),
        ([row(index="one")], "row 'one' needs its number as index"),
        ([row(index="1", answer="C")], "row '1' needs its answer among its options A, B, got 'C'"),
        ([row(index="1", image="pixels!")], r"row '1' needs its picture in base64 \("),
        ([row(index="1", A="")], "row '1' needs at least two options, got 0"),
        ([], "needs rows with the columns index, question, A, B, image, and lacks index"),
    ],
)
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMBench.read(table(tmp_path / "dev.tsv", rows))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    text = table(tmp_path / "dev.tsv", [row(index="1", hint='a "b"')]).read_text()
    for cut, message in (
        (text[: text.index('b""')], "is no whole TSV file"),
        (text.replace("\tdev", ""), "needs as many fields as"),
    ):
        (tmp_path / "dev.tsv").write_text(cut)
        with pytest.raises(ValueError, match=message):
            MMBench.read(tmp_path / "dev.tsv")
    with pytest.raises(FileNotFoundError, match="at .*gone.tsv; fetch it"):
        MMBench.read(tmp_path / "gone.tsv")


LLAVA = pytest.mark.skipif("LLAVA_REF" not in os.environ, reason="needs LLAVA_REF, a checkout of LLaVA")


@LLAVA
def test_options_are_llavas(tmp_path: Path) -> None:
    file = Path(os.environ["LLAVA_REF"]) / "llava/eval/model_vqa_mmbench.py"
    tree = ast.parse(file.read_text())
    tree.body = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in ("is_none", "get_options")
    ]
    space: dict[str, Any] = {"math": __import__("math")}
    exec(compile(tree, str(file), "exec"), space)
    draw = random.Random(0)
    for _ in range(200):
        given = row(
            index="1",
            A="x",
            B="y",
            **{key: draw.choice(["x", "None", "NaN", "none", "-", "No"]) for key in "CD"},
        )
        asked = MMBench.read(table(tmp_path / "dev.tsv", [given | {"image": ""}])).questions[0].text
        options = space["get_options"](given, list("ABCD"))
        assert asked.split("\n")[1:-1] == [
            f"{key}. {text}" for key, text in zip("ABCD", options, strict=False)
        ]


@LLAVA
def test_the_sheet_is_llavas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    pytest.importorskip("pandas")
    rows = [*rounds(1, "wxyz", "y"), *rounds(2, "uv", "u"), row(index="3", C="None", D="later", hint="h\nh")]
    benchmark, texts = MMBench.read(table(tmp_path / "dev.tsv", rows)), [*"ABCDAB", "A. thing"]
    write_answers(tmp_path / "tiny.jsonl", benchmark.questions, texts)
    options = {
        "annotation-file": tmp_path / "dev.tsv",
        "result-dir": tmp_path,
        "upload-dir": tmp_path,
        "experiment": "tiny",
    }
    monkeypatch.setattr(
        sys, "argv", ["", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    )
    script = Path(os.environ["LLAVA_REF"]) / "scripts/convert_mmbench_for_submission.py"
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__"})
    benchmark.upload(tmp_path / "ours.xlsx", texts)
    ours, theirs = (openpyxl.load_workbook(tmp_path / f"{name}.xlsx").active for name in ("ours", "tiny"))
    assert list(ours.iter_rows(values_only=True)) == list(theirs.iter_rows(values_only=True))
