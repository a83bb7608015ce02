"""LLaVA's data as configurations name it: LLaVA-1.5's own files, and digits and shapes in the same ones.

    data = llava_data("playground/data", language_model="vicuna-7b-v1.5", asked=["textvqa", "gqa"], ...)

Files lie where LLaVA's README and docs/Evaluation.md have them; smaller scales write theirs so, and all are read by one reader.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gkl.data.content import check_content
from gkl.data.conversations import (
    LOOKED_AT,
    WORD,
    Conversation,
    check_tokenizer,
    plain,
    read_captions,
    read_conversations,
    vicuna_v1,
)
from gkl.data.crops import CentreCrop, PaddedSquare
from gkl.data.decoding import Decoder
from gkl.data.dialogues import Asked, DialogueData, Phase
from gkl.data.stores import Store, open_store
from gkl.evaluation.mmbench import MMBench
from gkl.evaluation.vqa import GQA, POPE, TextVQA
from gkl.evaluation.vqa_files import Benchmark, file_text
from gkl.lines import one_line
from gkl.models.language import folder_tokenizer, word_tokenizer, words_of
from gkl.models.normalise import mean_and_std

CAPTIONS, PICTURES = "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images"
CONVERSATIONS, TEXTS, WORDS = "llava_v1_5_mix665k.json", "texts.json", "words.txt"
TOLD = "told.json"
MM_DEV, MM_DEV_CN = "eval/mmbench/mmbench_dev_20230712.tsv", "eval/mmbench_cn/mmbench_dev_cn_20231003.tsv"
POPE_CATEGORIES = ("adversarial", "popular", "random")
Name = Literal["textvqa", "mmbench", "mmbench_cn", "gqa", "pope"]


def benchmark(root: Path, name: Name) -> tuple[Benchmark, str | None]:
    """A benchmark of LLaVA's eval folder, and where its pictures lie below root. Raises FileNotFoundError or ValueError."""
    folder = root / "eval"
    match name:
        case "textvqa":
            files = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
            return TextVQA.read(*(folder / "textvqa" / file for file in files)), "eval/textvqa/train_images"
        case "gqa":
            files = "llava_gqa_testdev_balanced.jsonl", "data/testdev_balanced_questions.json"
            return GQA.read(*(folder / "gqa" / file for file in files)), "eval/gqa/data/images"
        case "pope":
            labels = {c: folder / "pope" / "coco" / f"coco_pope_{c}.json" for c in POPE_CATEGORIES}
            return POPE.read(folder / "pope" / "llava_pope_test.jsonl", labels), "eval/pope/val2014"
        case "mmbench":
            return MMBench.read(root / MM_DEV), None
        case "mmbench_cn":
            return MMBench.read(root / MM_DEV_CN, chinese=True), None


def llava_data(
    root: str, language_model: str | None, asked: Sequence[Name], caption_epochs: int, caption_batch_size: int | None, epochs: int,
    image_size: int = 224, patch_size: int = 16, length: int = 2048, cards: int = 8, decoder: Decoder = "pillow", content: str | None = None,
    name: str = "llava_data",
) -> DialogueData:  # fmt: skip
    """LLaVA-1.5's two phases, captions and conversations, and its benchmarks.

    language_model: folder with the tokenizer; None for a token a word of words.txt below root. caption_epochs, caption_batch_size: of the first
    phase. epochs: of the second. patch_size: of the vision tower. cards: among which the published run shares a batch out.
    content: what gkl.data.content says of root, if it must be that. Raises FileNotFoundError or ValueError naming what is missing.
    """
    path = Path(root)
    check_content(root, content)
    store = open_store(path, "folder with LLaVA's data")
    names = {*store.names}
    captions = read_captions(path / CAPTIONS, {n.removeprefix(f"{PICTURES}/") for n in names})
    captions = [dataclasses.replace(each, picture=f"{PICTURES}/{each.picture}") for each in captions]
    conversations = read_conversations(path / CONVERSATIONS, names)
    tokenizer = _tokenizer(path, language_model, conversations)
    square = PaddedSquare(mean_and_std("openai")[0])
    phases = (
        Phase(captions, plain, CentreCrop(image_size, "bicubic"), caption_epochs, caption_batch_size),
        Phase(conversations, vicuna_v1, None, epochs, grouped=True),
    )
    return DialogueData(
        name, phases, tokenizer, store, _asked(path, asked, names), square, image_size,
        (image_size // patch_size) ** 2, length, cards, decoder, content,
    )  # fmt: skip


def texts(
    root: str, language_model: str | None, told_epochs: int, epochs: int, length: int = 2048, cards: int = 1, content: str | None = None,
    name: str = "texts",
) -> DialogueData:  # fmt: skip
    """What a language model learns words from before it sees: told.json below root, read as captions are, then texts.json.

    Both are conversations in LLaVA's form, without pictures. told_epochs, epochs: of either.
    """
    path = Path(root)
    check_content(root, content)
    conversations = read_conversations(path / TEXTS, ())
    phases = (
        Phase(read_conversations(path / TOLD, ()), plain, None, told_epochs),
        Phase(conversations, vicuna_v1, None, epochs),
    )
    tokenizer = _tokenizer(path, language_model, conversations)
    return DialogueData(name, phases, tokenizer, None, {}, None, 1, 0, length, cards, "pillow", content)


def _asked(path: Path, names: Sequence[Name], there: set[str]) -> dict[str, Asked]:
    """Benchmarks by name. Raises ValueError for one whose pictures are not there."""
    found: dict[str, Asked] = {}
    for name in names:
        made, pictures = benchmark(path, name)
        store: Store | None = None
        if pictures is not None:
            store = open_store(
                path / pictures,
                f"folder with {name}'s pictures",
                "fetch them, or leave the benchmark out of data.asked",
            )
            lacking = [str(q.picture) for q in made.questions if f"{pictures}/{q.picture!s}" not in there]
            if lacking:
                raise ValueError(
                    f"{name} asks about {len({*lacking}):,} pictures that are not in {path / pictures}, such as {lacking[0]!r}; fetch them, or "
                    "leave the benchmark out of data.asked"
                )
        found[name] = Asked(made, store)
    return found


def _tokenizer(path: Path, language_model: str | None, conversations: Sequence[Conversation]) -> Any:
    """Of a language model's folder, or of the words that a path lists. Raises ValueError for a list without those of the first texts."""
    if language_model:
        made = folder_tokenizer(language_model)
    else:
        words = file_text(path / WORDS).splitlines()
        said = words_of(text.replace(WORD, "") for each in conversations[:LOOKED_AT] for text in each.rounds)
        if unknown := sorted({*said} - {*words}):
            raise ValueError(
                f"{path / WORDS} lacks {len(unknown)} words of the texts beside it, such as {one_line(unknown[0])!r}; bring the list back"
            )
        made = word_tokenizer(words)
    check_tokenizer(made)
    return made
