"""Files of questions, annotations and answers of `gkl.evaluation.vqa`, and what is checked of them before a model is asked.

questions = read_questions("llava_pope_test.jsonl")
write_answers(Path("answers.jsonl"), questions, texts)
texts = read_answers("answers.jsonl", questions)
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gkl.atomic import atomically
from gkl.lines import one_line


@dataclass(frozen=True)
class Question:
    """A question as a model is asked.

    id: as its file has it. text: with the benchmark's closing sentence, without <image>. picture: its file, or its bytes.
    """

    id: int | str
    text: str
    picture: str | bytes
    category: str = ""


class Benchmark(Protocol):
    """What an evaluation asks of a benchmark. texts: the answers, one for each of its questions, in their order."""

    @property
    def questions(self) -> Sequence[Question]:
        """In the order of their answers."""

    def score(self, texts: Sequence[str]) -> dict[str, float]:
        """Measures by name, in percent."""

    def upload(self, path: Path, texts: Sequence[str]) -> None:
        """Write the answers as the benchmark takes them."""


def read_questions(path: str | Path) -> list[Question]:
    """A file of questions in LLaVA's form. Raises FileNotFoundError, or ValueError naming the line that is none."""
    rows = rows_with(path, json_lines(path), None, ("question_id", "image", "text"))
    if not rows:
        raise ValueError(f"{path} needs a question a line, got none")
    return [Question(row["question_id"], row["text"], row["image"], row.get("category", "")) for row in rows]


def write_answers(path: Path, questions: Sequence[Question], texts: Sequence[str], model: str = "") -> None:
    """Answers in LLaVA's form, a JSON object a line."""
    lines = [
        json.dumps({"question_id": q.id, "prompt": q.text, "text": text, "model_id": model, "metadata": {}})
        for q, text in zip(questions, texts, strict=True)
    ]
    with atomically(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def read_answers(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """The answers of such a file in the questions' order, joined by number and text. Raises ValueError for another file's."""
    given: dict[tuple[str, str], list[str]] = {}
    for row in rows_with(path, json_lines(path), None, ("question_id", "prompt", "text")):
        given.setdefault((str(row["question_id"]), row["prompt"]), []).append(row["text"])
    keys = [(str(question.id), question.text) for question in questions]
    asked = Counter(keys)
    wrong = {
        "without an answer": [key for key in asked if len(given.get(key, ())) < asked[key]],
        "answered twice": [key for key in asked if len(given.get(key, ())) > asked[key]],
        "that are not asked": [key for key in given if key not in asked],
    }
    if found := {what: some for what, some in wrong.items() if some}:
        counts = ", ".join(
            f"{len(some):,} {what} (such as {one_line(some[0][0])})" for what, some in found.items()
        )
        raise ValueError(
            f"{path} needs one answer to each of {len(keys):,} questions, got {counts}; give it the file it answers"
        )
    return [given[key].pop() for key in keys]


def json_lines(path: str | Path) -> list[Any]:
    """A file with a JSON value a line. Raises FileNotFoundError or ValueError naming the line."""
    rows = []
    for number, line in enumerate(file_text(path).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number} needs a JSON object, got {line[:60]!r}") from error
    return rows


def json_file(path: str | Path) -> Any:
    """A JSON file. Raises FileNotFoundError or ValueError."""
    try:
        return json.loads(file_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}); fetch it again") from error


def file_text(path: str | Path) -> str:
    """A file's text. Raises FileNotFoundError or ValueError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no file of questions, annotations or answers at {path}; fetch it or mend the path"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); fetch it again") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); mend it or the path") from error


def rows_with(path: str | Path, rows: Any, key: str | None, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file, under a key where one is given, each with these fields: words, or numbers called _id. Raises ValueError naming the first without."""
    name = type(rows).__name__
    if key:
        rows = rows.get(key) if isinstance(rows, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} needs a list of questions{f' under {key}' if key else ''}, got {name}")
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and all(_fits(field, row.get(field)) for field in fields)):
            raise ValueError(f"{path}, question {number} needs {', '.join(fields)}, got {row!r:.80}")
    return rows


def _fits(field: str, value: Any) -> bool:
    return isinstance(value, (str, int) if field.endswith("_id") else str)


def check_once(path: str | Path, keys: Sequence[Any]) -> None:
    """Raises ValueError for a question that is asked twice."""
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(
            f"{path} asks {len(twice):,} questions more than once, such as {one_line(twice[0])}; each is scored once"
        )


def check_annotated(questions: Any, annotations: Any, keys: Sequence[Any], rows: Mapping[Any, Any]) -> None:
    """Raises ValueError for questions without annotation. questions, annotations: their files. keys: of the questions."""
    if missing := [key for key in keys if key not in rows]:
        raise ValueError(
            f"{questions} has {len(missing):,} of {len(keys):,} questions that {annotations} does not know, such as {one_line(missing[0])}; "
            "take both of one version"
        )


def check_asked(
    questions: Any, annotations: Any, keys: Sequence[Any], rows: Mapping[Any, Any], what: str = "questions"
) -> None:
    """Raises ValueError for annotations without question."""
    if left := {*rows} - {*keys}:
        raise ValueError(
            f"{annotations} has {len(left):,} of {len(rows):,} {what} that {questions} does not ask after, such as {one_line(min(left))}; "
            "take both of one version"
        )


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON list, whole or not at all."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(rows))


def percent(shares: Sequence[float]) -> float:
    """The mean in percent, 0 of none."""
    return 100.0 * sum(shares) / max(1, len(shares))
