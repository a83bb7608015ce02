"""LLaVA-1.5 (Liu et al. 2024) on a CLIP tower of ours: two phases, one record (Table VIII).

Captions teach the projector alone; then conversations teach it and the language model's LoRA. Each phase has its own AdamW and its
own warm-up and cosine. Tower and language model stay as they were and out of checkpoints. The benchmarks' questions are answered by the
likeliest token each time. Source: scripts/v1_5 and llava/train of LLaVA at c121f04.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkl.data.augment import to_float
from gkl.data.dialogues import DialogueBatch
from gkl.data.label_pictures import as_png
from gkl.distributed import gathered, rank, world_size
from gkl.models.batch_norm import eval_mode
from gkl.models.language import Language
from gkl.models.llava import Llava as Network
from gkl.models.llava import set_text_keys
from gkl.rng import sample_keys
from trainers.loop.console import Console
from trainers.loop.training import Training
from trainers.methods.language import LanguageModelling
from trainers.methods.source import Source, check_same_teacher

ANSWER_BATCH, SHOWN_QUESTIONS = 32, 2
ENDINGS = {"mmbench": "xlsx", "mmbench_cn": "xlsx", "pope": "jsonl"}  # of the answers' files, else json


@dataclass(kw_only=True)
class Llava(LanguageModelling):
    """tower: the CLIP whose pictures' side it is. language_model: the language model, where it does not come from a folder.

    projector_lr: in the first phase; in the second the optimizer's own. longest_answer: tokens.
    """

    tower: Source
    language_model: Source | None = None
    projector_lr: float
    longest_answer: int = 128

    def bind(self, training: Training) -> None:
        """Put tower and language model in. Raises ValueError where they do not fit."""
        super().bind(training)
        network, data = self.network, self.data
        if (network.places, network.image_size) != (data.places, data.image_size):
            raise ValueError(
                f"model.tower={network.tower.name} makes {network.places} tokens of {network.image_size} pixels, got data for {data.places} of "
                f"{data.image_size}; set data.image_size and data.patch_size"
            )
        found, self.seen_by = self.tower.load(0)
        self.told_by: dict[str, Any] = {}
        spoken = None
        if self.language_model is not None:
            spoken, self.told_by = self.language_model.load(0)
        network.begin_from(found, spoken)
        if self.device.type == "cuda":
            network.recompute()
        self.rates: tuple[float, ...] = ()
        self.begun = 0  # the first epoch of the phase that the optimizer is of

    @property
    def network(self) -> Network:
        """LLaVA. Raises ValueError for another network."""
        if not isinstance(self.model, Network):
            raise ValueError(f"LLaVA needs its own network, got {type(self.model).__name__}; model=llava")
        return self.model

    @property
    def language(self) -> Language:
        """Its language model."""
        return self.network.language

    def trained_module(self) -> nn.Module:
        """Projector and adapters."""
        return self.network

    # --- a step -------------------------------------------------------------------------------------------------------

    def start_epoch(self, epoch: int) -> None:
        """Where a phase begins, its optimizer does."""
        first, _ = self.span(epoch)
        training, tuning = self.training, first > 1
        self.network.adapt(tuning)
        self.rates = self.rates or tuple(training.base_lrs)
        training.base_lrs = list(self.rates) if tuning else [self.projector_lr, 0.0]
        if self.begun != first:
            training.optimizer.state.clear()
            self.begun = first

    def loss_of(self, batch: DialogueBatch, weights: Tensor) -> Tensor:
        """As of a language model, with dropout in the adapters that follows from each text's place."""
        keys = sample_keys(self.training.seed, self.epoch, batch.sample, "adapters").to(self.device)
        set_text_keys(self.network, keys)
        return super().loss_of(batch, weights)

    def embedded(self, batch: DialogueBatch) -> Tensor:
        """Words and pictures."""
        x = to_float(batch.images).to(self.dtype)
        return self.network.embed(batch.tokens, x, batch.shown)

    def unrecordable(self) -> str:
        """And what the optimizer holds, which each phase begins anew."""
        return f"{super().unrecordable()}, and each phase begins with an optimizer's state of its own"

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """A step: what is frozen has no gradients of its own."""
        return {"model": 2.0}

    # --- what is measured and kept ------------------------------------------------------------------------------------

    def answers(self, name: str) -> list[str]:
        """To each question of a benchmark; each is asked by one process."""
        data, network = self.data, self.network
        given: dict[int, str] = {}
        end = data.tokenizer.eos_token_id
        with torch.no_grad(), eval_mode(network), self.training.compute.autocast():
            for place, (numbers, images, tokens) in enumerate(data.questions(name, ANSWER_BATCH)):
                if place % world_size() != rank():
                    continue
                x = to_float(images.to(self.device)).to(self.dtype)
                shown = torch.ones(1, dtype=torch.bool, device=self.device)
                texts = [
                    network.embed(t[None].to(self.device), x[k : k + 1], shown)[0]
                    for k, t in enumerate(tokens)
                ]
                found = network.language.answers(texts, end, self.longest_answer)
                given |= {
                    n: data.tokenizer.decode(answer, skip_special_tokens=True).strip()
                    for n, answer in zip(numbers, found, strict=True)
                }
        whole = {number: text for part in gathered(given) for number, text in part.items()}
        return [whole[number] for number in sorted(whole)]

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Every benchmark's measures, percent; its answers are written as it takes them, below answers/ of the run's folder."""
        self.model.load_state_dict(self.training.weights()[headline])
        self.network.adapt(True)
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {"weights": headline, "questions": {}, "shown": []}
        for name, asked in self.data.asked.items():
            texts = self.answers(name)
            if rank() == 0:
                (folder / "answers").mkdir(exist_ok=True)
                asked.benchmark.upload(folder / "answers" / f"{name}.{ENDINGS.get(name, 'json')}", texts)
            metrics |= asked.benchmark.score(texts)
            details["questions"][name] = len(texts)
            places = [len(texts) * number // SHOWN_QUESTIONS for number in range(SHOWN_QUESTIONS)]
            details["shown"] += [self.shown(name, place, texts) for place in places]
        return metrics, details

    def shown(self, name: str, number: int, texts: list[str]) -> dict[str, str]:
        """A question, its picture and the answer given."""
        benchmark, store = self.data.asked[name]
        question = benchmark.questions[number]
        picture = self.data.picture(question.picture, store)
        return {
            "benchmark": name,
            "question": question.text,
            "answer": texts[number],
            "picture": as_png(picture),
        }

    def origins(self) -> dict[str, Any]:
        """Tower and language model."""
        return {"tower": self.seen_by, **({"language_model": self.told_by} if self.told_by else {})}

    def state_dict(self) -> dict[str, Any]:
        """Which tower and language model these are, and whose phase the optimizer is of."""
        return {"teacher": self.origins(), "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict. Raises ConfigError for a checkpoint that was trained on others."""
        check_same_teacher(state["teacher"], self.origins())
        self.begun = state["begun"]
