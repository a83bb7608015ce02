"""MMBench and MMBench-CN: questions with up to four options, of which a model names the letter.

    benchmark = MMBench.read("mmbench_dev_20230712.tsv")             # chinese=True for mmbench_dev_cn_20231003.tsv
    benchmark.score(texts)                                           # {"mmbench": ..., "mmbench_vanilla": ...}, percent
    benchmark.upload(Path("mmbench_dev_20230712.xlsx"), texts)       # for its server; needs openpyxl

The file asks each question as often as it has options, these turned by one each time; mmbench counts a question whose
every round is right (circular evaluation). Source: LLaVA's model_vqa_mmbench.py and convert_mmbench_for_submission.py at
c121f04, and the benchmark's own kit for letters and rounds.
"""

import base64
import binascii
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from gkl.atomic import atomically
from gkl.evaluation.vqa_files import Question, check_once, file_text, percent

LETTERS = "ABCD"
COLUMNS = ("index", "question", "A", "B", "image")  # without which a file is not MMBench's
LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")  # of what is uploaded
ROUND = 1_000_000  # between the numbers of a question's rounds
CLOSING = "Answer with the option's letter from the given choices directly."
CLOSING_CN = "请直接回答选项字母。"
EMPTY = {  # what pandas, with which LLaVA reads the file, takes for no value; _empty adds what LLaVA does
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "n/a", "null",
}  # fmt: skip
STOPS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEAR_THE_END = 5  # words, among which a letter is taken for the answer


@dataclass(frozen=True)
class MMBench:
    """A split of MMBench. rows: its file's, in the questions' order. name: of its measure, mmbench or mmbench_cn."""

    questions: Sequence[Question]
    rows: Sequence[Mapping[str, str]]
    name: str

    @classmethod
    def read(cls, questions: str | Path, chinese: bool = False) -> Self:
        """A TSV file with pictures in base64. Raises FileNotFoundError, or ValueError naming the row that is wrong."""
        rows = _table(questions)
        asked = [_question(questions, row, CLOSING_CN if chinese else CLOSING) for row in rows]
        numbers = [question.id for question in asked]
        check_once(questions, numbers)
        if lost := {int(number) % ROUND for number in numbers} - {*numbers}:
            raise ValueError(
                f"{questions} has later rounds of {len(lost):,} questions without their first, such as {min(lost)}; fetch it whole"
            )
        answers = {row.get("answer", "") for row in rows}
        if not all(_empty(answer) or answer in LETTERS for answer in answers):
            raise ValueError(
                f"{questions} needs answers among {', '.join(LETTERS)}, got {sorted(answers)[:9]}"
            )
        bare = [{column: cell for column, cell in row.items() if column != "image"} for row in rows]
        return cls(asked, bare, "mmbench_cn" if chinese else "mmbench")

    @property
    def scored_here(self) -> bool:
        """Whether the file has the answers, as dev has and test has not."""
        return all(not _empty(row.get("answer", "")) for row in self.rows)

    def score(self, texts: Sequence[str]) -> dict[str, float]:
        """Questions right in every round, and in the first (vanilla). An answer that names no option is wrong.

        The benchmark's server asks a language model which option such an answer means. Raises ValueError without answers.
        """
        if not self.scored_here:
            raise ValueError(
                f"{self.name} has no answers in its file; upload what upload() writes to the benchmark's server"
            )
        hits = [
            letter(text, _options(row)) == row["answer"] for row, text in zip(self.rows, texts, strict=True)
        ]
        rounds: dict[int, list[bool]] = {}
        for question, hit in zip(self.questions, hits, strict=True):
            rounds.setdefault(int(question.id) % ROUND, []).append(hit)
        first = [hit for question, hit in zip(self.questions, hits, strict=True) if int(question.id) < ROUND]
        return {
            self.name: percent([all(each) for each in rounds.values()]),
            f"{self.name}_vanilla": percent(first),
        }

    def upload(self, path: Path, texts: Sequence[str]) -> None:
        """A sheet of questions, options and predictions for the benchmark's server. Raises ModuleNotFoundError."""
        try:
            sheets = import_module("openpyxl")
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{path.name} for MMBench's server needs openpyxl: pip install 'gkl[llava]'", name="openpyxl"
            ) from None
        kept = [column for column in self.rows[0] if column not in LEFT_OUT]
        book = sheets.Workbook(write_only=True)
        sheet = book.create_sheet("Sheet1")
        sheet.append([*kept[:6], "prediction", *kept[6:]])
        for row, text in zip(self.rows, texts, strict=True):
            cells = [None if _empty(row[column]) else row[column] for column in kept]
            cells[kept.index("index")] = int(row["index"])  # type: ignore[call-overload]
            sheet.append([*cells[:6], _printable(text), *cells[6:]])
        with atomically(path) as temporary:
            book.save(temporary)


def letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, by its letter or else by its words; None where that is not one option.

    options: by letter. A letter counts as a word of its own among the last few; words count in an answer that is not much
    longer than the options.
    """
    words = text.translate(STOPS).split()
    named = [option for option in options if option in words]
    if len(named) == 1:
        return named[0] if words.index(named[0]) > len(words) - NEAR_THE_END else None
    if named or len(text) > 2 * sum(map(len, options.values())):
        return None
    meant = [option for option, words_of in options.items() if words_of.lower() in text.lower()]
    return meant[0] if len(meant) == 1 else None


def _table(path: str | Path) -> list[dict[str, str]]:
    limit = csv.field_size_limit(sys.maxsize)  # pictures are long fields; the limit is the process's
    try:
        rows = list(csv.DictReader(io.StringIO(file_text(path), newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is no whole TSV file ({error}); fetch it again") from error
    finally:
        csv.field_size_limit(limit)
    columns = rows[0].keys() if rows else ()
    if lacking := [column for column in COLUMNS if column not in columns]:
        raise ValueError(
            f"{path} needs rows with the columns {', '.join(COLUMNS)}, and lacks {', '.join(lacking)}"
        )
    return rows


def _question(path: str | Path, row: Mapping[str, Any], closing: str) -> Question:
    """As LLaVA asks it: hint, question, options by letter, closing sentence."""
    where = f"{path}, row {row['index']!r}"
    if None in row or None in row.values():
        raise ValueError(f"{where} needs as many fields as the file has columns; fetch it again")
    if not row["index"].isdecimal():
        raise ValueError(f"{where} needs its number as index")
    options = _options(row)
    if len(options) < 2:
        raise ValueError(f"{where} needs at least two options, got {len(options)}")
    if row.get("answer", "A") not in options and not _empty(row.get("answer", "")):
        raise ValueError(
            f"{where} needs its answer among its options {', '.join(options)}, got {row['answer']!r}"
        )
    try:
        picture = base64.b64decode(row["image"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where} needs its picture in base64 ({error})") from error
    hint = row.get("hint", "")
    lines = [hint] * (not _empty(hint)) + [
        row["question"],
        *(f"{key}. {text}" for key, text in options.items()),
    ]
    return Question(int(row["index"]), "\n".join([*lines, closing]), picture, row.get("category", ""))


def _options(row: Mapping[str, str]) -> dict[str, str]:
    """The options by letter, up to the first that is empty."""
    options: dict[str, str] = {}
    for key in LETTERS:
        if _empty(row.get(key, "")):
            break
        options[key] = row[key]
    return options


def _empty(cell: str) -> bool:
    return cell in EMPTY or cell.lower() in ("nan", "none")


def _printable(text: str) -> str:
    """Without the characters that a sheet cannot hold."""
    return "".join(c for c in text if c >= " " or c in "\t\n\r")
