"""easy-vqa's shapes: its own questions and answers in GQA's form, captions from what the answers tell, written once."""

from pathlib import Path
from typing import Any

import pytest

easy_vqa = pytest.importorskip("easy_vqa", reason="needs easy-vqa, the extra llava")
pytest.importorskip("transformers", reason="needs transformers, the extra llava")

from gkl.data.shape_questions import by_picture, seen, shape_questions, shape_texts
from gkl.models.language import llama


@pytest.mark.long  # five thousand pictures are copied
def test_questions_are_the_package_s_own(tmp_path: Path) -> None:
    data = shape_questions(str(tmp_path / "shapes"), 1, 64, 1, length=512)
    benchmark: Any = data.asked["gqa"].benchmark
    questions, answers, pictures = easy_vqa.get_test_questions()
    assert len(benchmark.questions) == len(questions) == 9_673
    asked = sorted(
        (q.text.split("\n")[0], a, q.picture)
        for q, a in zip(benchmark.questions, benchmark.answers, strict=True)
    )
    assert asked == sorted((q, a, f"{p}.png") for q, a, p in zip(questions, answers, pictures, strict=True))
    assert all(
        is_open == (answer not in ("yes", "no"))
        for is_open, answer in zip(benchmark.open, benchmark.answers, strict=True)
    )
    assert set(benchmark.score(answers and list(benchmark.answers)).values()) == {100.0}
    captions, conversations = (phase.conversations for phase in data.phases)
    assert len(conversations) == 4_000 and sum(len(c.turns) // 2 for c in conversations) == 38_575
    assert 0.2 < len(captions) / len(conversations) <= 1
    llama("llama_shapes").check_fits(data.tokenizer, 512)
    assert data.tokenizer.unk_token_id not in {
        t for q in benchmark.questions[:500] for t in data.tokenizer.encode(q.text)
    }
    texts = shape_texts(str(tmp_path / "shapes"), 1, 1, length=512)
    assert texts.tokenizer.get_vocab() == data.tokenizer.get_vocab() and len(
        texts.phases[0].conversations
    ) == len(captions)


def test_what_a_picture_shows_follows_from_its_answers() -> None:
    rounds = by_picture(
        (["what is it?", "what color is it?", "is it red?"], ["circle", "blue", "no"], [7, 7, 8])
    )
    assert seen(rounds[7]) == "a blue circle" and seen(rounds[8]) is None
