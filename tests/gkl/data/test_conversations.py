"""LLaVA's conversations: tokens and labels against a straight-line restatement and LLaVA's own functions, batches, bad files."""

import ast
import copy
import itertools
import json
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gkl.data.conversations import (
    IGNORED,
    IMAGE,
    SYSTEM,
    Conversation,
    asked,
    check_tokenizer,
    collate,
    grouped_batches,
    plain,
    read_captions,
    read_conversations,
    vicuna_v1,
)
from gkl.data.crops import CentreCrop, PaddedSquare
from gkl.rng import sample_keys

LLAVA = pytest.mark.skipif("LLAVA_REF" not in os.environ, reason="needs LLAVA_REF, a checkout of LLaVA")
PLACES, LENGTH = 5, 2048


class Words:
    """A token a word, as a small language model has them: none for spaces, 1 before a text, 2 for </s>."""

    bos_token_id, eos_token_id, pad_token_id, legacy, model_max_length = 1, 2, 0, True, LENGTH

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def pieces(self, text: str, first: bool) -> list[str]:
        return re.findall(r"\w+|\n|[^\w\s]", text)

    def encode(self, text: str) -> list[int]:
        tokens = [1]
        for part in re.split(r"(</s>)", text):
            pieces = self.pieces(part, len(tokens) == 1) if part else []
            found = [self.numbers.setdefault(piece, len(self.numbers) + 3) for piece in pieces]
            tokens += [2] if part == "</s>" else found
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        names = {number: piece for piece, number in self.numbers.items()} | {
            1: "<s>",
            2: "</s>",
            IMAGE: "<image>",
        }
        return "|".join(names[token] for token in tokens)

    def __call__(self, text: Any, **_: Any) -> types.SimpleNamespace:
        """As LLaVA calls transformers' tokenizers, with one text or a list of one."""
        if isinstance(text, list):
            return types.SimpleNamespace(input_ids=torch.tensor([self.encode(each) for each in text]))
        return types.SimpleNamespace(input_ids=self.encode(text))


class Pieces(Words):
    """As LLaMA's sentencepiece: a space is part of the word behind it, or a token where none is; each text begins with one."""

    def pieces(self, text: str, first: bool) -> list[str]:
        marked = ("▁" if self.legacy or first else "") + text.replace(" ", "▁")
        return re.findall(r"▁US(?=ER)|ER|USER|▁?[^\W_▁]+|▁|\n|[^\w\s]", marked)


class NewerPieces(Pieces):
    """legacy=False: no space after </s>, so that USER is another token there, one instead of two."""

    legacy = False


TURNS = {
    "one answer": ["<image>\nWhat is it?", "A cat."],
    "the picture behind": ["What is  it?\n<image>", "Two lines\nof answer, 3.5 m"],
    "only a picture": ["<image>", "A dog"],
    "three rounds": ["<image>\nWho?", "me", "And USER now?", " a space before", "Why", "Because: of it."],
    "no picture": ["Write <image> in HTML.", "<image> is no tag", "Thanks", "You are welcome"],
    "spaces behind": ["<image>\nq", "a ", "q ", "b"],
}
LOST = {
    "an empty answer": ["<image>\nq", "a", "q", ""],
    "an empty question": ["<image>\nq", "a", "", "a"],
    "nothing between two ends": ["<image>\nq", "a</s>"],
    "an unanswered question": ["<image>\nq", "a", "q"],
    "the end within": ["<image>\nq", "a</s>b"],
    "the template within": ["<image>\nsay ASSISTANT: x", "a"],
}

ODD = {
    "an empty answer in between": ["<image>\nq", "", "q", "a"],
    "the template before the answer": ["<image>\nq ASSISTANT:", "a"],
}  # of which LLaVA learns what follows the mark


def row(turns: Sequence[str], **given: Any) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[n % 2], "value": turn} for n, turn in enumerate(turns)]
    shows = (
        {"image": "a/b.jpg"}
        if any("<image>\n" in turn or turn.endswith("<image>") for turn in turns[:1])
        else {}
    )
    return {"id": "x", "conversations": said} | shows | given


def read(folder: Path, *rows: Mapping[str, Any]) -> list[Conversation]:
    (folder / "mix.json").write_text(json.dumps(rows))
    return read_conversations(folder / "mix.json", {"a/b.jpg"})


def unplaced(tokens: torch.Tensor, labels: torch.Tensor) -> tuple[list[int], list[int]]:
    """With one token for a picture, after all its places were looked at."""
    pairs, at = [], 0
    found = list(zip(tokens.tolist(), labels.tolist(), strict=True))
    while at < len(found):
        if found[at][0] == IMAGE:
            assert found[at : at + PLACES] == [(IMAGE, IGNORED)] * PLACES
        pairs.append(found[at])
        at += PLACES if found[at][0] == IMAGE else 1
    return [token for token, _ in pairs], [label for _, label in pairs]


def restated_v1(turns: Sequence[str], picture: bool, tokenizer: Words) -> tuple[list[int], list[int]]:
    """The rules in their simplest form: write all down, encode it between pictures, then walk from </s> to </s>."""
    text = SYSTEM + " "
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        if picture and "<image>" in question:
            question = ("<image>\n" + question.replace("<image>", "").strip()).strip()
        text += f"USER: {question} ASSISTANT: {answer}</s>"
    chunks = [tokenizer.encode(chunk) for chunk in (text.split("<image>") if picture else [text])]
    tokens = chunks[0] + [token for chunk in chunks[1:] for token in [IMAGE, *chunk[1:]]]
    labels, colon, says = [IGNORED] * len(tokens), tokenizer.numbers[":"], False
    for at, token in enumerate(tokens):
        labels[at] = token if says else IGNORED
        if token == 2:
            says = False
        elif token == colon and "ANT" in tokenizer.decode(tokens[at - 1 : at]):
            says = True
    return tokens, labels


@pytest.mark.parametrize("tokenizer", [Words(), Pieces(), NewerPieces()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_answers_and_their_ends_are_learned(tmp_path: Path, turns: list[str], tokenizer: Words) -> None:
    (conversation,) = read(tmp_path, row(turns))
    check_tokenizer(tokenizer)
    found = unplaced(*vicuna_v1(conversation, tokenizer, PLACES, LENGTH))
    assert found == restated_v1(turns, conversation.picture is not None, tokenizer)


def test_what_is_learned_read_as_words(tmp_path: Path) -> None:
    """No rule restated: written down by hand."""
    words = Words()
    (conversation,) = read(tmp_path, row(["Who?\n<image>", "It is me.", "And he?", "no"]))
    tokens, labels = unplaced(*vicuna_v1(conversation, words, PLACES, LENGTH))
    assert words.decode(tokens).split("questions|.|")[1] == (
        "USER|:|<image>|\n|Who|?|ASSISTANT|:|It|is|me|.|</s>|USER|:|And|he|?|ASSISTANT|:|no|</s>"
    )
    assert words.decode([label for label in labels if label != IGNORED]) == "It|is|me|.|</s>|no|</s>"
    (caption,) = read(tmp_path, row(["Describe it.\n<image>", "a red\nthing "]))
    tokens, labels = unplaced(*plain(caption, words, PLACES, LENGTH))
    assert words.decode(tokens) == "<s>|<image>|a|red|\n|thing|\n"
    assert words.decode([label for label in labels if label != IGNORED]) == "a|red|\n|thing|\n"
    assert labels[:2] == [IGNORED, IGNORED]


@pytest.mark.parametrize("turns", LOST.values(), ids=LOST)
def test_what_llava_cannot_tell_apart_is_read_and_not_learned(tmp_path: Path, turns: list[str]) -> None:
    (conversation,) = read(tmp_path, row(turns))
    tokens, labels = vicuna_v1(conversation, Pieces(), PLACES, LENGTH)
    assert not conversation.learned and (labels == IGNORED).all() and (tokens == IMAGE).sum() == PLACES


def test_a_question_is_asked_as_it_was_taught(tmp_path: Path) -> None:
    for tokenizer in (Words(), Pieces()):
        (conversation,) = read(tmp_path, row(["<image>\nWhat?", "it"]))
        tokens, labels = vicuna_v1(conversation, tokenizer, PLACES, LENGTH)
        assert asked("What?", tokenizer, PLACES).tolist() == tokens[labels == IGNORED].tolist()


def test_what_is_too_long_is_cut_after_the_pictures_have_their_places(tmp_path: Path) -> None:
    (conversation,) = read(tmp_path, row(TURNS["three rounds"]))
    whole = vicuna_v1(conversation, Pieces(), 196, LENGTH)
    cut = vicuna_v1(conversation, Pieces(), 196, 250)
    assert len(whole[0]) > 250 == len(cut[0]) and all(
        torch.equal(a[:250], b) for a, b in zip(whole, cut, strict=True)
    )


def test_a_batch_is_padded_on_the_right(tmp_path: Path) -> None:
    data = read(tmp_path, row(TURNS["one answer"]), row(TURNS["three rounds"]))
    samples = [vicuna_v1(each, Pieces(), PLACES, LENGTH) for each in data]
    batch, count = collate(samples), len(samples[0][0])
    assert batch.tokens.shape == batch.labels.shape == batch.there.shape == (2, len(samples[1][0]))
    assert batch.there.sum(1).tolist() == [count, len(samples[1][0])] and batch.there[0, :count].all()
    assert (batch.labels[0, count:] == IGNORED).all() and torch.equal(batch.tokens[0, :count], samples[0][0])


def test_a_conversation_that_the_assistant_begins_is_read_from_its_second_turn_on(tmp_path: Path) -> None:
    begun = row(["q", "a"])
    begun["conversations"].insert(0, {"from": "gpt", "value": "Hello there"})
    (conversation,) = read(tmp_path, begun)
    assert conversation.turns == ["q", "a"] and conversation.words == 4 and conversation.picture is None


TURN = {"from": "human", "value": "q"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (row(["q", "a"], conversations=[TURN, TURN]), "needs turns of human and gpt, one after the other, got human, human"),
        (row(["q", "a"], conversations=[{"from": "gpt", "value": "a"}]), "one after the other, got gpt"),
        (row(["q", "a"], conversations=[{"from": "system", "value": "a"}]), "needs conversations, a list of turns with from and"),
        (row(["q", "a"], conversations=[]), "needs conversations, a list of turns"),
        (row(["q", "a"], image="a/b.jpg"), r"needs <image> in one turn of human, .* got it in the turns \[\] of 2"),
        (row(["q", "<image>"], image="a/b.jpg"), r"got it in the turns \[1\] of 2"),
        (row(["<image>\nq", "a", "<image>\nq", "a"]), r"got it in the turns \[0, 2\] of 4"),
        (row(["<image>\nq", "a"], image=None), "needs the name of a picture as image, got None"),
        (row(["<image>\nq", "a"], image="a/c.jpg"), "needs the picture a/c.jpg, one of 1 that are not there; fetch them, or"),
        ({"conversations": [{"from": "human", "value": "<image>\nq"}]}, "has <image> in a line of its own and no picture as image"),
        ("q", "needs conversations, a list of turns"),
    ],
)  # fmt: skip
def test_a_conversation_that_is_wrong_is_one_line(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"mix.json: conversation 1 .*{message}"):
        read(tmp_path, row(TURNS["one answer"]), given)


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="no conversations at .*gone.json; fetch LLaVA's, or mend the path"
    ):
        read_conversations(tmp_path / "gone.json", ())
    for text, message in (
        ("[{", "is no whole JSON file"),
        ("{}", "needs a list of conversations, got dict"),
        ("[]", "got list"),
    ):
        (tmp_path / "mix.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_conversations(tmp_path / "mix.json", ())
    with pytest.raises(ValueError, match="cannot be read"):
        read_conversations(tmp_path, ())
    read(tmp_path, row(["<image>\nq", "a"]), row(TURNS["no picture"]))
    with pytest.raises(
        ValueError, match="conversation 1 needs a picture and one answer, got None and 4 turns"
    ):
        read_captions(tmp_path / "mix.json", {"a/b.jpg"})


def test_a_tokenizer_of_another_family_is_one_line(tmp_path: Path) -> None:
    class Ends(Pieces):
        def encode(self, text: str) -> list[int]:
            return [*super().encode(text), 2]

    class Merges(Pieces):
        """The space belongs to the colon before it."""

        def pieces(self, text: str, first: bool) -> list[str]:
            return re.findall(r": ?|\w+|\s|[^\w\s]", text)

    with pytest.raises(
        ValueError, match="needs a tokenizer of the LLaMA family, in which </s> is the token eos_token_id"
    ):
        check_tokenizer(Ends())
    (conversation,) = read(tmp_path, row(TURNS["three rounds"]))
    with pytest.raises(
        ValueError, match="conversation 0: its tokens before answer 0 are not those of the text up to there"
    ):
        vicuna_v1(conversation, Merges(), PLACES, LENGTH)


def test_batches_are_of_one_kind_and_the_longest_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 99, (203,), generator=generator)
    pictured = torch.rand(203, generator=generator) < 0.7
    steps = grouped_batches(words, pictured, 8, seed=3, epoch=0)
    assert torch.cat(steps).sort().values.tolist() == list(range(203)), "each once"
    assert [len(step) for step in steps] == [8] * 25 + [3]
    last = 8 + 8 if sum(pictured) % 8 == 0 else 0
    rests = sum((int(count) - 1) % 8 + 1 for count in (pictured.sum(), (~pictured).sum()))
    alike = steps[: (203 - max(rests, last)) // 8]
    assert all(len({*pictured[step].tolist()}) == 1 for step in alike)
    assert all((words[step].diff() <= 0).all() for step in alike)
    kinds = [bool(pictured[step[0]]) for step in alike]
    assert 1 < sum(a != b for a, b in itertools.pairwise(kinds)), "the kinds take turns"
    other = grouped_batches(words, pictured, 8, seed=3, epoch=1)
    again = grouped_batches(words, pictured, 8, seed=3, epoch=0)
    assert all(torch.equal(a, b) for a, b in zip(steps, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(steps, other, strict=True))
    single = grouped_batches(words, torch.ones(203, dtype=torch.bool), 8, seed=3, epoch=0)
    assert [len(step) for step in single] == [8] * 25 + [3] and all(
        (words[step].diff() <= 0).all() for step in single
    )


def test_a_picture_in_the_middle_of_a_square() -> None:
    mean = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    wide = Image.new("RGB", (30, 11), (200, 10, 60))
    for picture, bare in (
        (wide, (slice(None), slice(0, 9))),
        (wide.rotate(90, expand=True), (slice(None), slice(None), slice(0, 9))),
    ):
        view = PaddedSquare(mean)(picture, 30)
        assert view.shape == (3, 30, 30) and view.dtype == torch.uint8
        assert (view[bare] == torch.tensor([122, 116, 104])[:, None, None]).all()
        inside = (view == torch.tensor([200, 10, 60])[:, None, None]).all(0)
        assert inside.sum() == 30 * 11 and inside[15, 15]
    square = Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    assert torch.equal(PaddedSquare(mean)(square, 24), CentreCrop(24, "bicubic")(square, 24))


def llama(prepended: str) -> Any:
    """Byte pairs as LLaMA's tokenizer.json has them, learned from a few words. prepended: where a text or a part gets its space."""
    library = pytest.importorskip("tokenizers")
    normalizers, pre, processors = library.normalizers, library.pre_tokenizers, library.processors
    tokenizer = library.Tokenizer(library.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="always", split=True)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = library.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    text = [
        SYSTEM,
        "USER: What is it? ASSISTANT: a cat and a dog",
        *(turn for turns in TURNS.values() for turn in turns),
    ]
    tokenizer.train_from_iterator(text * 5, trainer)
    model = json.loads(tokenizer.to_str())
    model["added_tokens"] = [
        token for token in model["added_tokens"] if token["content"] in ("<unk>", "<s>", "</s>")
    ]
    tokenizer = library.Tokenizer.from_str(json.dumps(model))
    if prepended == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre.Sequence([])
    else:
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    class Llama(Words):
        legacy = prepended == "legacy"

        def encode(self, text: str) -> list[int]:
            return list(tokenizer.encode(text).ids)

        def decode(self, tokens: Sequence[int]) -> str:
            return "".join(str(tokenizer.id_to_token(token)) for token in tokens)

    return Llama()


@pytest.mark.parametrize("prepended", ["legacy", "first"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_a_tokenizer_of_the_llama_family_learns_the_answers(
    tmp_path: Path, turns: list[str], prepended: str
) -> None:
    tokenizer = llama(prepended)
    check_tokenizer(tokenizer)
    (conversation,) = read(tmp_path, row(turns))
    tokens, labels = unplaced(*vicuna_v1(conversation, tokenizer, PLACES, LENGTH))
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    wanted = "".join(f" {answer}</s>" for answer in turns[1::2])
    assert learned.replace("▁", " ").replace("<0x0A>", "\n") == wanted
    assert tokens.count(IMAGE) == (conversation.picture is not None)


def llavas(tokenizer: Words) -> types.SimpleNamespace:
    """LLaVA's functions that make tokens and labels; of its imports these need none but torch and its own."""
    root, space = Path(os.environ["LLAVA_REF"]) / "llava", types.ModuleType("conversation")
    exec(compile((root / "conversation.py").read_text(), "conversation.py", "exec"), vars(space))
    names: dict[str, Any] = {
        "torch": torch, "copy": copy, "Image": Image, "conversation_lib": space, "IGNORE_INDEX": -100, "IMAGE_TOKEN_INDEX": -200,
        "DEFAULT_IMAGE_TOKEN": "<image>", "IS_TOKENIZER_GREATER_THAN_0_14": True, "Dict": dict, "Sequence": Sequence,
        "transformers": types.SimpleNamespace(PreTrainedTokenizer=Any), "DataArguments": Any,
    }  # fmt: skip
    for file in ("mm_utils.py", "train/train.py"):
        tree = ast.parse((root / file).read_text())
        wanted = (
            "tokenizer_image_token",
            "expand2square",
            "preprocess_v1",
            "preprocess_plain",
            "preprocess_multimodal",
        )
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
        exec(compile(tree, file, "exec"), names)
    return types.SimpleNamespace(**names)


def their_v1(given: Mapping[str, Any], tokenizer: Words) -> tuple[list[int], list[int]]:
    theirs, sources = llavas(tokenizer), [copy.deepcopy(given["conversations"])]
    theirs.conversation_lib.default_conversation = theirs.conversation_lib.conv_templates["v1"]
    if "image" in given:
        theirs.preprocess_multimodal(
            sources, types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
        )
    made = theirs.preprocess_v1(sources, tokenizer, has_image="image" in given)
    return made["input_ids"][0].tolist(), made["labels"][0].tolist()


@LLAVA
@pytest.mark.parametrize("name", ["pieces", "newer pieces", "legacy llama"])
@pytest.mark.parametrize("turns", [*TURNS.values(), *LOST.values(), *ODD.values()], ids=[*TURNS, *LOST, *ODD])
def test_stage_two_is_llavas_preprocess_v1(tmp_path: Path, turns: list[str], name: str) -> None:
    tokenizer = (
        {"pieces": Pieces, "newer pieces": NewerPieces}[name]() if "llama" not in name else llama("legacy")
    )
    (conversation,) = read(tmp_path, row(turns))
    tokens, labels = unplaced(*vicuna_v1(conversation, tokenizer, PLACES, LENGTH))
    theirs = their_v1(row(turns), tokenizer)
    assert labels == theirs[1] and conversation.learned == ({*labels} != {IGNORED})
    assert tokens == theirs[0]


@LLAVA
def test_stage_one_is_llavas_preprocess_plain(tmp_path: Path) -> None:
    for tokenizer in (Pieces(), llama("legacy"), llama("first")):
        for caption in ("a red thing", " a\nb ", "x"):
            given = row(["Describe it.\n<image>", caption])
            theirs = llavas(tokenizer)
            theirs.conversation_lib.default_conversation = theirs.conversation_lib.conv_templates["plain"]
            made = theirs.preprocess_plain([copy.deepcopy(given["conversations"])], tokenizer)
            found = unplaced(*plain(read(tmp_path, given)[0], tokenizer, PLACES, LENGTH))
            assert found == (made["input_ids"][0].tolist(), made["labels"][0].tolist())


@LLAVA
def test_a_question_is_asked_as_llava_asks_it() -> None:
    theirs, tokenizer = llavas(Pieces()), Pieces()
    conversation = theirs.conversation_lib.conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat is it?\nA. cat")
    conversation.append_message(conversation.roles[1], None)
    tokens = asked("What is it?\nA. cat", tokenizer, 1).tolist()
    assert tokens == theirs.tokenizer_image_token(conversation.get_prompt(), tokenizer)


@LLAVA
def test_the_square_is_llavas() -> None:
    theirs = llavas(Words()).expand2square
    for size in ((31, 12), (12, 31), (13, 13), (14, 27)):
        picture = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB")
        wanted = CentreCrop(max(size), "bicubic")(theirs(picture, (122, 116, 104)), max(size))
        assert torch.equal(PaddedSquare((0.48145466, 0.4578275, 0.40821073))(picture, max(size)), wanted)


@LLAVA
def test_batches_are_llavas_given_its_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.randperm gives ours: the rest is the sampler's own doing, on one process."""
    tree = ast.parse((Path(os.environ["LLAVA_REF"]) / "llava/train/llava_trainer.py").read_text())
    wanted = ("split_to_even_chunks", "get_length_grouped_indices", "get_modality_length_grouped_indices")
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    theirs: dict[str, Any] = {"torch": torch}
    exec(compile(tree, "llava_trainer.py", "exec"), theirs)
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, 30, (90,), generator=generator)
    for pictured in (
        torch.rand(90, generator=generator) < 0.6,
        torch.arange(90) < 48,
        torch.ones(90, dtype=torch.bool),
    ):
        groups = [pictured.nonzero().squeeze(1), (~pictured).nonzero().squeeze(1)]
        draws = [sample_keys(5, 2, group, "conversations").argsort() for group in groups if len(group)]
        monkeypatch.setattr(
            torch,
            "randperm",
            lambda count, generator=None, draws=draws: (
                draws.pop(0)
                if draws
                else sample_keys(5, 2, torch.arange(count), "conversation_batches").argsort()
            ),
        )
        order = theirs["get_modality_length_grouped_indices"](
            torch.where(pictured, words, -words).tolist(), 8, 1
        )
        assert torch.cat(grouped_batches(words, pictured, 8, seed=5, epoch=2)).tolist() == [
            int(n) for n in order
        ]
