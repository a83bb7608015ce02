"""LLaVA's data: phases, orders, parts of processes, worker processes, files that are written once, and what is wrong with a folder."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers, the extra llava")

from gkl.data.conversation_sets import CAPTIONS, CONVERSATIONS, MM_DEV, PICTURES, llava_data
from gkl.data.conversations import IGNORED, IMAGE
from gkl.data.crops import PaddedSquare
from gkl.data.dialogues import DialogueBatch, DialogueBatches, DialogueData
from gkl.data.digit_questions import ALIKE, digit_questions, digit_texts, rounds_of
from gkl.data.digits import digits
from gkl.data.stores import PictureError
from gkl.data.tokens import DIGITS
from gkl.distributed import Shard

EVERY: Any = ["textvqa", "mmbench", "mmbench_cn", "gqa", "pope"]
VIEW = PaddedSquare((0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialogues") / "questions"
    digit_questions(str(folder), [], 1, 64, 2)
    return folder


def data_at(root: Path, asked: Any = (), cards: int = 4) -> DialogueData:
    return digit_questions(str(root), asked, 1, 48, 2, cards=cards)


def batches_of(data: DialogueData, **settings: Any) -> DialogueBatches:
    given = {
        "device": torch.device("cpu"),
        "shard": Shard(8),
        "workers": 0,
        "batch_size": 32,
        "seed": 3,
        **settings,
    }
    return data.batches(augment=VIEW, drop_last=False, **given)


def test_a_phase_has_its_own_texts_form_and_batches(root: Path) -> None:
    data = data_at(root)
    assert data.epochs == 3 and len(data.train_labels) == 2 * 1437
    batches = batches_of(data)
    assert (batches.steps_in(1), batches.steps_in(2), batches.samples(0)) == (30, 45, 48)
    batch = batches.batch(1, 0)
    assert batch.images.shape == (48, 3, 8, 8) and batch.shown.all()
    assert ((batch.tokens == IMAGE).sum(1) == 16).all() and (
        batch.labels[batch.tokens == IMAGE] == IGNORED
    ).all()
    assert batch.card.bincount().tolist() == [12] * 4
    captions = [data.tokenizer.decode(row[row != IGNORED]).split() for row in batch.labels]
    assert all(words[:2] == ["the", "digit"] for words in captions)
    batches.start_epoch(2)
    assert batches.samples(0) == 32 and batches.steps_per_epoch == 45
    answers = data.tokenizer.decode(batches.batch(2, 0).labels[0][batches.batch(2, 0).labels[0] != IGNORED])
    assert answers.count("</s>") == 1


def test_pictures_belong_to_their_texts(root: Path) -> None:
    """The digit of a caption is that of the scan beside it."""
    data = data_at(root)
    batch = batches_of(data).batch(1, 3)
    scans = digits()
    for image, row in zip(batch.images, batch.labels, strict=True):
        (number,) = (scans.train_images == image).flatten(1).all(1).nonzero().squeeze(1).tolist()
        word = data.tokenizer.decode(row[row != IGNORED]).split()[-1]
        assert word == DIGITS[scans.train_labels[number]]


def test_every_text_comes_once_an_epoch_whoever_reads(root: Path) -> None:
    data = data_at(root)
    alone, helped = batches_of(data), batches_of(data, workers=2)
    for epoch in (1, 2):
        seen: list[int] = []
        for each in (alone, helped):
            each.start_epoch(epoch)
        for step in range(alone.steps_per_epoch):
            seen += alone.order[step].tolist()
        assert sorted(seen) == list(range(1437))
    for step in (0, 1, 44):
        for a, b in zip(alone.batch(2, step), helped.batch(2, step), strict=True):
            assert a.equal(b)
    assert not multiprocessing.active_children(), "they end with their epoch"
    other = batches_of(data, seed=4)
    other.start_epoch(2)
    assert not other.order[0].equal(alone.order[0])


def test_lengths_go_together_within_a_batch_and_over_cards(root: Path) -> None:
    data = data_at(root)
    batches = batches_of(data)
    batches.start_epoch(2)
    words = torch.tensor([each.words for each in data.phases[1].conversations])
    for order, cards in list(zip(batches.order, batches.cards, strict=True))[:-1]:
        means = torch.stack([words[order[cards == n]].double().mean() for n in range(4)])
        assert means.max() - means.min() <= 3
        assert all((words[order[cards == n]].diff() <= 0).all() for n in range(4))


def test_processes_share_a_batch_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_at(root)
    whole = batches_of(data).batch(1, 2)
    parts = []
    monkeypatch.setattr("gkl.distributed.world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("gkl.distributed.rank", lambda rank=rank: rank)
        parts.append(batches_of(data).batch(1, 2))
    assert torch.cat([part.images for part in parts]).equal(whole.images)
    assert torch.cat([part.card for part in parts]).equal(whole.card)
    assert torch.cat([part.sample for part in parts]).equal(whole.sample)


def test_a_part_of_a_batch_has_its_own_pictures() -> None:
    images = torch.arange(3 * 3 * 2 * 2, dtype=torch.uint8).view(3, 3, 2, 2)
    rows = torch.arange(5)[:, None]
    shown = torch.tensor([True, False, True, False, True])
    batch = DialogueBatch(
        images, rows, rows, rows >= 0, shown, torch.zeros(5, dtype=torch.int64), torch.arange(5)
    )
    part = batch.part(slice(1, 4))
    assert part.images.equal(images[1:2]) and part.sample.tolist() == [1, 2, 3]
    assert batch.part(slice(3, 4)).images.shape == (0, 3, 2, 2)


def test_the_digest_is_of_what_is_said_and_asked(root: Path, tmp_path: Path) -> None:
    one, again = data_at(root, ["gqa"]), data_at(root, ["gqa"])
    assert one.sha256 == again.sha256 and one.sha256 != data_at(root).sha256
    assert one.trained_on == data_at(root, ["pope"]).trained_on  # other questions, the same training
    copied = tmp_path / "copy"
    shutil.copytree(root, copied)
    assert data_at(copied, ["gqa"]).sha256 == one.sha256  # wherever it lies
    rows = json.loads((copied / CAPTIONS).read_text())
    rows[5]["conversations"][1]["value"] = "the digit five"
    (copied / CAPTIONS).write_text(json.dumps(rows))
    other = data_at(copied, ["gqa"])
    assert other.sha256 != one.sha256 and other.trained_on != one.trained_on


def test_questions_are_asked_as_llava_asks_them(root: Path) -> None:
    data = data_at(root, EVERY)
    assert {name: len(each.benchmark.questions) for name, each in data.asked.items()} == {
        "textvqa": 360, "mmbench": 480, "mmbench_cn": 480, "gqa": 360, "pope": 720,
    }  # fmt: skip
    seen: list[int] = []
    for numbers, images, tokens in data.questions("mmbench", 50):
        seen += numbers
        assert images.shape[1:] == (3, 8, 8) and len(images) == len(tokens) == len(numbers)
        assert all((each == IMAGE).sum() == 16 for each in tokens)
        assert len({len(each) for each in tokens}) == 1
    assert sorted(seen) == list(range(480))
    for name, each in data.asked.items():  # what is right has every point
        benchmark: Any = each.benchmark
        right = {
            "textvqa": lambda b: [given[0] for given in b.given],
            "gqa": lambda b: list(b.answers),
            "pope": lambda b: ["yes" if there else "no" for there in b.present],
        }.get(name, lambda b: [row["answer"] for row in b.rows])(benchmark)
        scores = benchmark.score(right)
        shares = {k: v for k, v in scores.items() if not k.endswith("_yes")}
        assert {*shares.values()} == {100.0}, name


def test_a_stand_in_s_questions_can_be_told_apart() -> None:
    import random

    draw = random.Random(0)
    every = [rounds_of(3, draw, 6) for _ in range(200)]
    assert all(len({question for question, _ in rounds}) == 6 for rounds in every)
    said = [answer for rounds in every for question, answer in rounds if "is there" in question]
    assert 0.4 < said.count("yes") / len(said) < 0.6
    assert all(digit != other for digit, other in ALIKE.items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / PICTURES), "needs the picture .*fetch them, or name the folder"),
        (lambda r: (r / CONVERSATIONS).unlink(), "no conversations at .*mix665k.json; fetch LLaVA's, or mend the path"),
        (lambda r: (r / CONVERSATIONS).write_text("["), "is no whole JSON file"),
        (lambda r: (r / "words.txt").unlink(), "words.txt"),
        (lambda r: (r / "eval/gqa/data/images/0007.png").unlink(), "gqa asks about 1 pictures that are not in .*leave the benchmark out of data.asked"),
        (lambda r: shutil.rmtree(r / "eval/pope/val2014"), "no folder with pope's pictures at .*leave the benchmark out of data.asked"),
        (lambda r: (r / MM_DEV).write_text("index\tquestion\n1\tx\n"), "needs rows with the columns"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_a_line(root: Path, tmp_path: Path, damage: Any, message: str) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(root, copied)
    damage(copied)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data_at(copied, EVERY)
    assert "\n" not in str(caught.value)


def test_no_data_at_all_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder with LLaVA's data at .*nowhere; set data.root"):
        llava_data(str(tmp_path / "nowhere"), None, EVERY, 1, None, 1)


def test_a_damaged_picture_is_named(root: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(root, copied)
    data = data_at(copied)
    for picture in (copied / PICTURES).rglob("*.png"):
        picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(PictureError, match=r"\.png"):
        batches_of(data).batch(1, 0)


def test_texts_alone(root: Path) -> None:
    """Digits told in the picture's place: first read as captions are, then asked about."""
    data = digit_texts(str(root), told_epochs=1, epochs=2)
    batches = batches_of(data, batch_size=16)
    told = batches.batch(1, 0)
    assert told.images.shape == (0, 3, 1, 1) and not told.shown.any() and data.asked == {}
    for row, labels in zip(told.tokens, told.labels, strict=True):
        words = data.tokenizer.decode(row).split()
        assert words == [words[0]] * 16 + ["the", "digit", words[0]] and labels.equal(row)
    batches.start_epoch(2)
    text = data.tokenizer.decode(batches.batch(2, 0).tokens[0])
    assert any(text.count(word) >= 16 for word in DIGITS)
    assert data.tokenizer.get_vocab() == data_at(root).tokenizer.get_vocab()


def test_texts_that_are_cut_before_every_answer_are_told(root: Path) -> None:
    """Before the first step where it is so of all; of one batch, as a picture that is not to be had."""
    for length in (1, 20):
        with pytest.raises(ValueError, match=f"^data.length={length} cuts off all .* of the 64 texts"):
            batches_of(digit_questions(str(root), (), 1, 48, 2, length=length))
    data = digit_questions(str(root), (), 1, 48, 2)
    batches = batches_of(data)
    object.__setattr__(data, "length", 20)
    batches.start_epoch(2)
    with pytest.raises(PictureError, match="has an answer to learn .*data.length=20 cuts them off"):
        batches.batch(2, 0)


@pytest.mark.parametrize("left", [0, 40])
def test_a_list_of_words_that_lost_some_is_told(left: int, tmp_path: Path) -> None:
    """Once every other word was the same unknown one, and a language model that told none apart had its record."""
    digit_texts(str(tmp_path / "all"), told_epochs=1, epochs=2)
    words = tmp_path / "all/words.txt"
    words.write_text("".join(words.read_text().splitlines(keepends=True)[:left]))
    with pytest.raises(
        ValueError, match=r"words.txt lacks \d+ words of the texts beside it, such as .*; bring the list back"
    ):
        digit_texts(str(tmp_path / "all"), told_epochs=1, epochs=2)
    with pytest.raises(ValueError, match=r"words.txt lacks \d+ words of the texts beside it"):
        data_at(tmp_path / "all")
