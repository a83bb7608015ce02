"""What captions are made of: tokenizers, class names and the templates that put a name into a sentence.

    tokenizer, names, templates = bpe(77), imagenet_names(), imagenet_templates()
    tokens = tokenizer([template(names[0]) for template in templates])          # (80, 77)

A class is its place in the list: OpenCLIP's 1,000 names of ImageNet have 998 different words.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gkl.models.clip import Tokenizer, open_clip

Template = Callable[[str], str]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES: tuple[str, ...] = (
    "a scan of the digit {}",
    "a handwritten {}",
    "the number {} on white paper",
    "a small grey picture of a {}",
    "someone wrote {} with a pen",
    "this is what {} looks like",
    "one more {} in our collection",
    "the figure {} as a person draws it",
)


class Words:
    """One token a word of given texts; 0 fills up, 1 begins a text, the largest ends it.

    vocab_size: words and these. Unknown words are an error: there is nothing to say for them.
    """

    def __init__(self, texts: Iterable[str], context_length: int) -> None:
        words = sorted({word for text in texts for word in text.lower().split()})
        self.numbers = {word: number for number, word in enumerate(words, 2)}
        self.vocab_size, self.context_length = len(words) + 3, context_length

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens (n, context_length) int64; what is too long is cut. Raises ValueError for a word that is not known."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            try:
                inside = [self.numbers[word] for word in text.lower().split()]
            except KeyError as error:
                raise ValueError(
                    f"data.tokenizer=words does not know the word {error.args[0]!r} of the caption {text!r}; use data.tokenizer=bpe"
                ) from None
            found = [1, *inside[: self.context_length - 2], self.vocab_size - 1]
            row[: len(found)] = torch.tensor(found)
        return tokens


def bpe(context_length: int = 77) -> Tokenizer:
    """OpenCLIP's tokenizer, OpenAI's byte pairs: 49,408 tokens; longer texts are cut. Raises ValueError where it is not installed."""
    made: Tokenizer = open_clip().SimpleTokenizer(context_length=context_length)
    return made


def imagenet_names() -> tuple[str, ...]:
    """OpenCLIP's names of ImageNet's classes, in the order of their WordNet ids."""
    return tuple(open_clip().IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[Template, ...]:
    """The 80 templates of OpenAI's ImageNet evaluation."""
    return tuple(open_clip().OPENAI_IMAGENET_TEMPLATES)


def templates_of(sentences: Sequence[str]) -> tuple[Template, ...]:
    """Templates of sentences with a {} for the name."""
    return tuple(sentence.format for sentence in sentences)


def every_text(names: Sequence[str], templates: Sequence[Template]) -> list[str]:
    """Each name in each template, name by name."""
    return [template(name) for name in names for template in templates]


__all__: Any = [
    "DIGITS", "DIGIT_TEMPLATES", "Template", "Tokenizer", "Words", "bpe", "every_text", "imagenet_names", "imagenet_templates", "templates_of",
]  # fmt: skip
