"""Language models of the LLaMA family, transformers' own, and tokenizers that fit them.

    language = llama("llama_scan")                              # freshly initialised
    language = llama("vicuna-7b", folder="vicuna-7b-v1.5")      # whatever LLaMA-family weights lie there
    logits = language(language.embed(tokens))                   # (B, L, V)

transformers is imported when a network or a tokenizer is first made.
"""

import json
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {
    "vicuna-7b": (32000, 4096, 11008, 32, 32, 4096), "vicuna-13b": (32000, 5120, 13824, 40, 40, 4096),
    "llama_scan": (128, 96, 256, 3, 6, 256), "llama_shapes": (64, 128, 344, 4, 8, 512),
}  # fmt: skip
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TYPICAL_TOKENS = 256  # of a text, where the cost of one is asked for


def transformers() -> Any:
    """The package. Raises ValueError where it is not installed."""
    return _package("transformers")


def peft() -> Any:
    """The package. Raises ValueError where it is not installed."""
    return _package("peft")


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"LLaVA's language models are transformers', its adapters peft's, and {error.name} is missing: pip install 'gkl[llava]'"
        ) from error


class Language(nn.Module):
    """A causal language model that reads embeddings, so that pictures can stand among its words."""

    def __init__(self, name: str, model: Any) -> None:
        """model: transformers' LlamaForCausalLM."""
        super().__init__()
        self.name = name
        self.model: Any = model

    @property
    def width(self) -> int:
        """Of an embedding."""
        return int(self.model.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.model.config.vocab_size)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> embeddings (B, L, D)."""
        embedded: Tensor = self.model.get_input_embeddings()(tokens)
        return embedded

    def hidden(self, embedded: Tensor) -> Tensor:
        """What the last layer says at each place, (B, L, D). Padding is on the right, where no earlier place sees it."""
        length = embedded.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=embedded.device).tril()
        found: Tensor = self.model.model(
            inputs_embeds=embedded, attention_mask=before[None, None], use_cache=False
        ).last_hidden_state
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits of the next token (..., V)."""
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def forward(self, embedded: Tensor) -> Tensor:
        """Embeddings (B, L, D) -> logits of each place's next token (B, L, V)."""
        return self.head(self.hidden(embedded))

    def answers(self, embedded: list[Tensor], end: int, at_most: int) -> list[list[int]]:
        """What follows each text (L, D), the likeliest token each time, up to `end` without it, or at_most tokens."""
        longest = max(map(len, embedded))
        batch = torch.stack([torch.cat([e.new_zeros(longest - len(e), self.width), e]) for e in embedded])
        there = torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in embedded], device=batch.device)
        made = self.model.generate(
            inputs_embeds=batch, attention_mask=there, do_sample=False, num_beams=1, max_new_tokens=at_most,
            eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        return [row[: row.index(end)] if end in row else row for row in made.tolist()]

    def check_fits(self, tokenizer: Any, length: int, place: str = "model.language") -> None:
        """Raises ValueError for a tokenizer with more tokens than there are embeddings, and for texts beyond what positions are known of."""
        known = int(self.model.config.max_position_embeddings)
        if len(tokenizer) > self.vocab_size:
            raise ValueError(
                f"{place}={self.name} has {self.vocab_size} tokens, and the tokenizer {len(tokenizer)}; take both of one language model"
            )
        if length > known:
            raise ValueError(f"{place}={self.name} reads {known} tokens at most, got data.length={length}")

    def example_inputs(self) -> tuple[Tensor, ...]:
        """A text of typical length, for counting what it costs."""
        return (torch.zeros(1, TYPICAL_TOKENS, self.width, dtype=self.model.dtype),)


def llama(
    name: str, folder: str | None = None, content: str | None = None, dtype: str = "float32", num_classes: int = 0
) -> Language:  # fmt: skip
    """A language model, freshly initialised, or with the weights of a folder as transformers' save_pretrained writes it.

    name: one of SIZES; of a folder's model what it is called here. content: of the folder, told for a run's identity alone.
    dtype: that its weights are kept in, float32 or bfloat16. num_classes: of nothing. Raises ValueError naming what is missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a language model's dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    package, planning = transformers(), torch.get_default_device().type == "meta"
    if folder is not None and not (planning and name in SIZES):
        return Language(name, _from_folder(package, Path(folder), DTYPES[dtype], planning))
    if name not in SIZES:
        raise ValueError(
            f"there is no language model {name!r}; there are {', '.join(SIZES)}, or give a folder with one"
        )
    config = package.LlamaConfig(**dict(zip(FIELDS, SIZES[name], strict=True)), tie_word_embeddings=False)
    made = package.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])  # no whole copy in float32
    if not planning:
        for part in (
            made.modules()
        ):  # transformers' 0.02 is for thousands of channels: narrow ones would hardly learn to compare words
            if isinstance(part, nn.Embedding | nn.Linear):
                nn.init.normal_(
                    part.weight, std=1.0 if isinstance(part, nn.Embedding) else config.hidden_size**-0.5
                )
    return Language(name, made)


def _from_folder(package: Any, folder: Path, dtype: torch.dtype, planning: bool) -> Any:
    """The weights at a folder; a network without any where a run is only planned."""
    file = folder / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"no language model at {folder} (config.json is missing); put Vicuna-7B v1.5 or another of the LLaMA family there, or set "
            "model.language.folder=..."
        ) from None
    except ValueError as error:
        raise ValueError(f"{file} is no whole JSON file ({error}); fetch it again") from error
    if (kind := described.get("model_type")) != "llama":
        raise ValueError(f"{folder} needs a language model of the LLaMA family, got {kind!r}")
    if planning:
        return package.LlamaForCausalLM(package.LlamaConfig(**described))
    try:
        model, told = package.LlamaForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the weights at {folder} cannot be read ({' '.join(str(error).split())[:200]}); fetch them again"
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} of the language model's weights, such as {missing[0]}; fetch it again"
        )
    return model


def folder_tokenizer(folder: str) -> Any:
    """The tokenizer of a language model's folder. Raises ValueError where there is none."""
    try:
        return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=False)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"no tokenizer at {folder} ({' '.join(str(error).split())[:160]}); it lies beside a language model's weights"
        ) from error


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer, transformers', of given words and marks, Chinese ones character by character; `words_of` finds those of texts."""
    parts = _package("tokenizers")
    numbers = {word: number for number, word in enumerate(["<unk>", "</s>", "\n", *words])}
    made = parts.Tokenizer(parts.models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = parts.pre_tokenizers.Sequence(
        [
            parts.pre_tokenizers.Split(parts.Regex(r"[^\S\n]+"), "removed"),
            parts.pre_tokenizers.Split(parts.Regex(WORD), "isolated"),
        ]
    )
    return transformers().PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def words_of(texts: Iterable[str]) -> list[str]:
    """The words and marks of texts, each once."""
    return sorted({word for text in texts for word in re.findall(WORD, text.replace("</s>", " "))} - {"\n"})


WORD = r"\n|[\u4e00-\u9fff]|[A-Za-z0-9_]+|[^\sA-Za-z0-9_]"
