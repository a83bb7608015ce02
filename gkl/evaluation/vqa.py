"""The benchmarks of Table VIII that ask in words: TextVQA, GQA and POPE. MMBench is `gkl.evaluation.mmbench`.

    benchmark = GQA.read(questions="llava_gqa_testdev_balanced.jsonl", annotations="testdev_balanced_questions.json")
    texts = [...]                                   # a model's answer to each of benchmark.questions
    benchmark.score(texts)                          # {"gqa_open": ..., "gqa_accuracy": ...}, percent
    benchmark.upload(Path("predictions.json"), texts)

Questions are LLaVA's files (a JSON object a line, its own closing sentence in the text), annotations the benchmarks' own.
They are joined when they are read, before any model is: a benchmark that was read can be scored. Source: LLaVA's
llava/eval and scripts at c121f04, and GQA's eval.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gkl.evaluation.vqa_files import (
    Question,
    check_annotated,
    check_asked,
    check_once,
    json_file,
    json_lines,
    percent,
    read_questions,
    rows_with,
    write_answers,
    write_json,
)
from gkl.evaluation.vqa_words import normalised
from gkl.lines import one_line

ANSWERS = 10  # by people, to a question of TextVQA


@dataclass(frozen=True)
class TextVQA:
    """TextVQA's validation questions. given: what ten people answered. numbers: TextVQA's own of the questions."""

    questions: Sequence[Question]
    given: Sequence[Sequence[str]]
    numbers: Sequence[int]

    @classmethod
    def read(cls, questions: str | Path, annotations: str | Path) -> Self:
        """annotations: TextVQA_0.5.1_val.json. Joined by picture and question. Raises FileNotFoundError or ValueError."""
        asked = read_questions(questions)
        rows = {}
        for row in rows_with(
            annotations, json_file(annotations), "data", ("image_id", "question", "question_id")
        ):
            if not (isinstance(row.get("answers"), list) and len(row["answers"]) == ANSWERS):
                raise ValueError(
                    f"{annotations}: question {one_line(row['question_id'])} needs {ANSWERS} answers by people, got {row.get('answers')!r:.60}"
                )
            rows[str(row["image_id"]), row["question"].lower()] = row
        keys = [(str(question.id), _asked_of_text(question).lower()) for question in asked]
        check_annotated(questions, annotations, keys, rows)
        check_asked(questions, annotations, keys, rows)
        joined = [rows[key] for key in keys]
        return cls(asked, [row["answers"] for row in joined], [row["question_id"] for row in joined])

    def score(self, texts: Sequence[str]) -> dict[str, float]:
        """VQA accuracy: three people's answer is right, one's or two's in part, over all choices of nine of the ten."""
        shares = []
        for given, text in zip(self.given, texts, strict=True):
            same = [normalised(answer) for answer in given].count(normalised(text))
            # Leaving one out: (same - 1) others agree where it was among the same, all of them where it was not.
            shares.append((same * min(1, (same - 1) / 3) + (ANSWERS - same) * min(1, same / 3)) / ANSWERS)
        return {"textvqa": percent(shares)}

    def upload(self, path: Path, texts: Sequence[str]) -> None:
        """As the challenge's server takes them."""
        asked = zip(self.numbers, self.questions, texts, strict=True)
        write_json(path, [{"question_id": n, "image_id": q.id, "answer": text} for n, q, text in asked])


@dataclass(frozen=True)
class GQA:
    """GQA's balanced questions. answers: the right ones. open: whether the question asks for more than one of two."""

    questions: Sequence[Question]
    answers: Sequence[str]
    open: Sequence[bool]

    @classmethod
    def read(cls, questions: str | Path, annotations: str | Path) -> Self:
        """annotations: testdev_balanced_questions.json. Joined by GQA's number. Raises FileNotFoundError or ValueError."""
        asked = read_questions(questions)
        rows = json_file(annotations)
        whole = isinstance(rows, dict) and all(
            isinstance(row, dict)
            and {"answer", "isBalanced"} <= row.keys()
            and isinstance(row.get("types"), dict)
            and "structural" in row["types"]
            for row in rows.values()
        )
        if not whole:
            raise ValueError(
                f"{annotations} needs answer, types.structural and isBalanced under each question's number; fetch GQA's own"
            )
        rows = {number: row for number, row in rows.items() if row["isBalanced"]}
        keys = [str(question.id) for question in asked]
        check_once(questions, keys)
        check_annotated(questions, annotations, keys, rows)
        check_asked(questions, annotations, keys, rows)
        types = [rows[key]["types"]["structural"] for key in keys]
        return cls(asked, [rows[key]["answer"] for key in keys], [kind == "query" for kind in types])

    def score(self, texts: Sequence[str]) -> dict[str, float]:
        """Exact match, over all questions and by their kind."""
        right = [_plain(text) == answer for text, answer in zip(texts, self.answers, strict=True)]
        kinds = list(zip(right, self.open, strict=True))
        return {
            "gqa_open": percent([hit for hit, is_open in kinds if is_open]),
            "gqa_binary": percent([hit for hit, is_open in kinds if not is_open]),
            "gqa_accuracy": percent(right),
        }

    def upload(self, path: Path, texts: Sequence[str]) -> None:
        """As GQA's eval.py reads them."""
        asked = zip(self.questions, texts, strict=True)
        write_json(path, [{"questionId": str(q.id), "prediction": _plain(text)} for q, text in asked])


@dataclass(frozen=True)
class POPE:
    """POPE's questions after things that are or are not in a picture, category by category. present: the right answers.

    Joined by picture and question, neither by position nor by number: the list of the random category grew from 2,910 to
    3,000 questions and was numbered anew, so that either of them pairs answers with other questions' labels.
    """

    questions: Sequence[Question]
    present: Sequence[bool]

    @classmethod
    def read(cls, questions: str | Path, annotations: Mapping[str, str | Path]) -> Self:
        """annotations: coco_pope_<category>.json by category. Raises FileNotFoundError or ValueError."""
        asked = read_questions(questions)
        if strange := sorted({question.category for question in asked} ^ {*annotations}):
            raise ValueError(
                f"{questions} needs questions of the categories {', '.join(sorted(annotations))}, and of no other; it differs in "
                f"{one_line(', '.join(strange))}"
            )
        rows = {}
        for category, path in annotations.items():
            for row in rows_with(path, json_lines(path), None, ("image", "text", "label")):
                if row["label"] not in ("yes", "no"):
                    raise ValueError(f"{path} needs labels yes and no, got {row['label']!r:.60}")
                rows[category, row["image"], _thing(row["text"])] = row["label"] == "yes"
        keys = [(question.category, question.picture, _thing(question.text)) for question in asked]
        check_once(questions, keys)
        files = ", ".join(map(str, annotations.values()))
        check_annotated(questions, files, keys, rows)
        shown = {
            (category, picture) for category, picture, _ in rows
        }  # the longer list has the same pictures
        check_asked(questions, files, [key[:2] for key in keys], dict.fromkeys(shown), "pictures")
        return cls(asked, [rows[key] for key in keys])

    def score(self, texts: Sequence[str]) -> dict[str, float]:
        """F1, accuracy, precision and recall of "yes", and its share of the answers, by category and their mean.

        pope_<category> is the F1, as LLaVA reports POPE. A precision or recall of nothing is 0.
        """
        found: dict[str, list[tuple[bool, bool]]] = {}
        for question, present, text in zip(self.questions, self.present, texts, strict=True):
            found.setdefault(question.category, []).append((says_yes(text), present))
        scores = {category: _detection(pairs) for category, pairs in sorted(found.items())}
        named = {
            f"pope_{category}" + f"_{name}" * (name != "f1"): value
            for category, measures in scores.items()
            for name, value in measures.items()
        }
        names = next(iter(scores.values()))
        means = {name: sum(measures[name] for measures in scores.values()) / len(scores) for name in names}
        return named | {f"pope_mean_{name}": value for name, value in means.items()}

    def upload(self, path: Path, texts: Sequence[str]) -> None:
        """As LLaVA's eval_pope.py reads them; POPE has no server."""
        write_answers(path, self.questions, texts)


def says_yes(text: str) -> bool:
    """Whether the answer's first sentence has neither no nor not among its words."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & {*words}


def _detection(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Measures of (said, present)."""
    said, present = sum(said for said, _ in pairs), sum(present for _, present in pairs)
    both = sum(said and present for said, present in pairs)
    return {
        "f1": 100.0 * 2 * both / max(1, said + present),
        "accuracy": percent([said == present for said, present in pairs]),
        "precision": 100.0 * both / max(1, said),
        "recall": 100.0 * both / max(1, present),
        "yes": 100.0 * said / len(pairs),
    }


def _plain(text: str) -> str:
    return text.rstrip(".").lower()


def _thing(text: str) -> str:
    """What a question of POPE asks after; in older files it is "in the imange" after an article "an"."""
    return text.split("\n")[0].replace("imange", "image")


def _asked_of_text(question: Question) -> str:
    """The question without the words read in the picture and without the closing sentence. Raises ValueError."""
    lines = question.text.split("\n")
    if question.text.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", question.text, re.DOTALL)
        if found:
            return found[1]
    elif len(lines) == 3 and "Reference OCR token: " in question.text:
        return lines[1] if lines[0].startswith("Reference OCR token:") else lines[0]
    elif len(lines) == 2:
        return lines[0]
    raise ValueError(
        f"question {one_line(question.id)} needs the lines question, Reference OCR token and instruction, got {question.text!r:.80}"
    )
