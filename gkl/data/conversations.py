"""LLaVA's training data: conversations from their file, the tokens a language model reads, and which of them it learns.

    data = read_conversations("llava_v1_5_mix665k.json", pictures={*store.names})
    tokens, labels = vicuna_v1(data[0], tokenizer, places=196, length=2048)      # (L,) each
    batch = collate([(tokens, labels), ...])                                     # (B, L)
    steps = grouped_batches(words, pictured, batch_size=128, seed=0, epoch=0)

The picture is one word of the text, <image>, and as many places of the tokens as the vision tower has patches; the places
carry IMAGE, and no label. Nothing here knows a library of language models: a tokenizer is anything with `encode`. Source:
preprocess_plain, preprocess_v1 and the collator of LLaVA's llava/train/train.py, mm_utils.py and llava_trainer.py at c121f04.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gkl.lines import one_line
from gkl.rng import sample_keys

IGNORED = -100  # the label of what is not learned
IMAGE = -200  # the token of a picture's place
LOOKED_AT = 64  # texts, before any is trained on
WORD = "<image>"
END = "</s>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SPEAKERS = ("human", "gpt")
ANSWER = " ASSISTANT: "


class Tokenizer(Protocol):
    """What is asked of a tokenizer: transformers' of the LLaMA family have it."""

    bos_token_id: int | None
    eos_token_id: int

    def encode(self, text: str) -> list[int]:
        """The text's tokens, after the beginning's where there is one; </s> is one token, eos_token_id."""


@dataclass(frozen=True)
class Conversation:
    """Turns of a person and an assistant, in turn. name: where it is, for messages. picture: its file, if it has one.

    The turn that shows the picture begins with "<image>\\n". words: of all that was said, by which batches are grouped.
    """

    name: str
    turns: Sequence[str]
    picture: str | None
    words: int

    @property
    def rounds(self) -> list[str]:
        """What version v1 writes for the turns, up to each </s> but without it; empty turns leave a mark less, as in LLaVA."""
        text = f"{SYSTEM} "
        for number, turn in enumerate(self.turns):
            role, mark = ("ASSISTANT", END) if number % 2 else ("USER", " ")
            text += f"{role}: {turn}{mark}" if turn else f"{role}:"
        return text.split(END)

    @property
    def learned(self) -> bool:
        """Whether version v1 learns its answers: not where the last one is missing, or a turn is written as the marks are.

        LLaVA cannot tell the rounds of such a conversation apart, says so, and leaves it out of the loss.
        """
        *rounds, rest = self.rounds
        return not rest and all(len(each.split(ANSWER)) == 2 for each in rounds)


# Tokens and labels (L,) of a conversation, given the tokenizer, a picture's places and the length.
Form = Callable[[Conversation, Tokenizer, int, int], tuple[Tensor, Tensor]]


class Tokens(NamedTuple):
    """A batch of conversations, padded on the right. tokens, labels: (B, L) int64. there: (B, L) bool, False for padding."""

    tokens: Tensor
    labels: Tensor
    there: Tensor


def read_conversations(path: str | Path, pictures: Collection[str]) -> list[Conversation]:
    """A file in LLaVA's form, [{"id", "image", "conversations": [{"from", "value"}, ...]}, ...].

    pictures: the names of those that are there, a set where there are many. A conversation that the assistant begins is
    read from the second turn on, as LLaVA does. Raises FileNotFoundError, or ValueError naming the first that is wrong.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no conversations at {path}; fetch LLaVA's, or mend the path") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); mend it or the path") from error
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}); fetch it again") from error
    if not (isinstance(rows, list) and rows):
        raise ValueError(f"{path} needs a list of conversations, got {type(rows).__name__} {rows!r:.40}")
    data = [_conversation(f"{path}: conversation {number}", row) for number, row in enumerate(rows)]
    if lacking := [each for each in data if each.picture is not None and each.picture not in pictures]:
        raise ValueError(
            f"{lacking[0].name} needs the picture {one_line(lacking[0].picture)}, one of {len(lacking):,} that are not there; fetch them, or "
            "name the folder that they are relative to"
        )
    return data


def read_captions(path: str | Path, pictures: Collection[str]) -> list[Conversation]:
    """The same for version plain: each conversation one picture and what it shows. Raises as read_conversations."""
    data = read_conversations(path, pictures)
    for each in data:
        if each.picture is None or len(each.turns) != 2:
            raise ValueError(
                f"{each.name} needs a picture and one answer, got {each.picture!r} and {len(each.turns)} turns"
            )
    return data


def _conversation(where: str, row: Any) -> Conversation:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not (isinstance(turns, list) and turns and all(_is_turn(turn) for turn in turns)):
        raise ValueError(f"{where} needs conversations, a list of turns with from and value, got {row!r:.80}")
    words = sum(len(turn["value"].split()) for turn in turns)
    speakers = [turn["from"] for turn in turns]
    begins = speakers[0] == SPEAKERS[1]
    said = [turn["value"] for turn in turns[begins:]]
    wanted = [SPEAKERS[number % 2] for number in range(len(said))]
    if not said or speakers[begins:] != wanted:
        raise ValueError(
            f"{where} needs turns of human and gpt, one after the other, got {', '.join(speakers)[:80]}"
        )
    picture = row.get("image")
    shown = [number for number, turn in enumerate(said) if WORD in turn]
    if "image" in row:
        if not isinstance(picture, str):
            raise ValueError(f"{where} needs the name of a picture as image, got {picture!r:.80}")
        if len(shown) != 1 or shown[0] % 2:
            raise ValueError(
                f"{where} needs {WORD} in one turn of human, as it has a picture, got it in the turns {shown} of {len(said)}"
            )
        said[shown[0]] = f"{WORD}\n{said[shown[0]].replace(WORD, '').strip()}".strip()
    elif any(WORD in said[number].split("\n") for number in shown if number % 2 == 0):
        raise ValueError(
            f"{where} has {WORD} in a line of its own and no picture as image; name it, or take the line out"
        )
    return Conversation(where, said, picture, words)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("from") in SPEAKERS and isinstance(turn.get("value"), str)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises ValueError for a tokenizer that has no end of text, or sets one by itself."""
    bare, ended = tokenizer.encode("a"), tokenizer.encode(f"a{END}")
    if ended != [*bare, tokenizer.eos_token_id] or tokenizer.eos_token_id in bare:
        raise ValueError(
            f"LLaVA needs a tokenizer of the LLaMA family, in which {END} is the token eos_token_id and is set by nobody else; "
            f"this one makes {bare} of 'a', {ended} of 'a{END}', and has eos_token_id={tokenizer.eos_token_id}"
        )


def plain(
    conversation: Conversation, tokenizer: Tokenizer, places: int, length: int
) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (L,) each, of stage 1: the picture and its caption; caption and line end are learned.

    places: of a picture. length: the most tokens, later ones are cut.
    """
    tokens = _encode(tokenizer, "", f"{conversation.turns[1]}\n")
    known = len(_encode(tokenizer, "", ""))
    return _placed(tokens, [IGNORED] * known + tokens[known:], places, length)


def vicuna_v1(
    conversation: Conversation, tokenizer: Tokenizer, places: int, length: int
) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (L,) each, of stage 2: questions and answers; the answers and their </s> are learned.

    places: of a picture. length: the most tokens, later ones are cut. Raises ValueError for a tokenizer that does not fit.
    """
    rounds, shows = conversation.rounds, conversation.picture is not None
    tokens = _encode(tokenizer, *_chunks(END.join(rounds), shows))
    labels = [IGNORED] * len(tokens)
    end = 0
    for number, each in enumerate(rounds[:-1] if conversation.learned else ()):
        # What comes before an answer, in its place: after a </s>, some tokenizers begin a word otherwise than a text.
        question = f"{END if number else ''}{each.split(ANSWER)[0]}{ANSWER.rstrip()}"
        before = _encode(tokenizer, *_chunks(question, shows))
        before = before[before.index(tokenizer.eos_token_id) + 1 :] if number else before
        start = end + len(before)
        if tokens[end:start] != before or tokenizer.eos_token_id not in tokens[start:]:
            raise ValueError(
                f"{conversation.name}: its tokens before answer {number} are not those of the text up to there; take a tokenizer of "
                "the LLaMA family"
            )
        end = tokens.index(tokenizer.eos_token_id, start) + 1
        labels[start:end] = tokens[start:end]
    return _placed(tokens, labels, places, length)


def asked(text: str, tokenizer: Tokenizer, places: int) -> Tensor:
    """The tokens of a question about a picture, up to where the answer begins, (L,). text: without <image>."""
    tokens = _encode(tokenizer, f"{SYSTEM} USER: ", f"\n{text} ASSISTANT:")
    return _placed(tokens, tokens, places, len(tokens) + places)[0]


def _chunks(text: str, shows: bool) -> list[str]:
    """The text between pictures; in a conversation without one, the word is a word."""
    return text.split(WORD) if shows else [text]


def _encode(tokenizer: Tokenizer, *chunks: str) -> list[int]:
    """Tokens of the chunks, each encoded for itself, a picture between each two; the beginning of the text is set once."""
    tokens: list[int] = []
    for number, chunk in enumerate(chunks):
        found = tokenizer.encode(chunk)
        if number:
            tokens.append(IMAGE)
            begins = tokenizer.bos_token_id is not None and found[:1] == [tokenizer.bos_token_id]
            found = found[begins:]
        tokens += found
    return tokens


def check_length(
    conversations: Sequence[Conversation], form: Form, tokenizer: Tokenizer, places: int, length: int
) -> None:
    """Raises ValueError for a length that cuts off all that could be learned of the first texts."""
    first = conversations[:LOOKED_AT]
    if first and all((form(each, tokenizer, places, length)[1][1:] == IGNORED).all() for each in first):
        raise ValueError(
            f"data.length={length} cuts off all that could be learned of the {len(first)} texts that were looked at, the first is "
            f"{first[0].name}; choose a greater length"
        )


def _placed(tokens: list[int], labels: list[int], places: int, length: int) -> tuple[Tensor, Tensor]:
    """Each picture in all its places, none of them learned, and the whole cut to a length."""
    pairs = [
        pair for pair in zip(tokens, labels, strict=True) for _ in range(places if pair[0] == IMAGE else 1)
    ][:length]
    both = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return both[:, 0].clone(), both[:, 1].clone()


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Tokens:
    """A batch of tokens and labels, padded with 0 and IGNORED."""
    tokens, labels = zip(*samples, strict=True)
    there = [torch.ones_like(each, dtype=torch.bool) for each in tokens]
    return Tokens(
        pad_sequence(list(tokens), batch_first=True),
        pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
        pad_sequence(there, batch_first=True),
    )


def grouped_batches(
    words: Tensor, pictured: Tensor, batch_size: int, *, seed: int, epoch: int
) -> list[Tensor]:
    """An epoch's batches of conversation numbers: in each, only ones with or only ones without picture, the longest first.

    words: (N,) of each conversation. pictured: (N,) bool. What fills no batch, and the last batch of either kind, come at the
    end, mixed. Part n of p of a batch is every p-th from n on: parts of about the same length.
    """
    groups = [
        _shuffled(group, seed, epoch, "conversations").split(batch_size)
        for group in (pictured.nonzero().squeeze(1), (~pictured).nonzero().squeeze(1))
        if len(group)
    ]
    groups = [[each[words[each].argsort(descending=True, stable=True)] for each in group] for group in groups]
    if len(groups) < 2:
        return groups[0] if groups else []
    full = groups[0][:-1] + groups[1][:-1]
    rest = torch.cat([group[-1] for group in groups]).sort().values
    order = _shuffled(torch.arange(len(full)), seed, epoch, "conversation_batches")
    return [full[number] for number in order.tolist()] + list(rest.split(batch_size))


def _shuffled(numbers: Tensor, seed: int, epoch: int, stream: str) -> Tensor:
    return numbers[sample_keys(seed, epoch, numbers, stream).argsort(stable=True)]
