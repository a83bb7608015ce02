"""A language model that learns to answer, from texts alone: what LLaVA has at the smaller scales in the place of Vicuna.

    loss = mean over cards of (mean over a card's answer tokens of -log p(token | all before it))

Source: transformers' causal language models as LLaVA's training calls them, a mean of means over the cards.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.data.conversations import IGNORED
from gkl.data.dialogues import DialogueBatch, DialogueBatches, DialogueData
from gkl.distributed import all_reduce
from gkl.models.batch_norm import eval_mode
from gkl.models.language import Language
from trainers.loop.console import Console
from trainers.loop.method import Method
from trainers.loop.training import Training


@dataclass(kw_only=True)
class LanguageModelling(Method):
    """Every weight is trained."""

    classifies: ClassVar[bool] = False
    takes_turns: ClassVar[bool] = True

    def bind(self, training: Training) -> None:
        """Raises ValueError where network and data do not fit."""
        super().bind(training)
        if not isinstance(training.data, DialogueData):
            raise ValueError(
                f"a language model learns from conversations, got {training.data.name}; data=digit_texts, ..."
            )
        self.data: Any = training.data
        if training.epochs != self.data.epochs:
            raise ValueError(
                f"epochs={training.epochs}, and the phases of {self.data.name} have {self.data.epochs}; set data.epochs, which epochs follow"
            )
        self.language.check_fits(self.data.tokenizer, self.data.length)

    @property
    def language(self) -> Language:
        """The language model. Raises ValueError for another network."""
        if not isinstance(self.model, Language):
            raise ValueError(
                f"texts are read by a language model, got {type(self.model).__name__}; model=llama, ..."
            )
        return self.model

    @property
    def batches(self) -> DialogueBatches:
        """The training's."""
        return cast(DialogueBatches, self.training.batches)

    # --- a step -------------------------------------------------------------------------------------------------------

    def steps_in(self, epoch: int) -> int:
        """Of the epoch's phase."""
        return self.batches.steps_in(epoch)

    def span(self, epoch: int) -> tuple[int, int]:
        """First and last epoch of the epoch's phase."""
        _, first, last = self.batches.phase(epoch)
        return first, last

    def inputs(self, batch: DialogueBatch, epoch: int, step: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The batch."""
        return tuple(batch)

    def update(self, *batch: Tensor) -> dict[str, Tensor]:
        """One update; its loss is this process's share of the mean over the cards."""
        whole = DialogueBatch(*batch)
        self.model.train()
        shares = {"loss/answers": torch.zeros((), dtype=self.dtype, device=self.device)}
        self.optimizer_step(self.losses(whole, shares))
        self.after_step()
        return shares

    def losses(self, batch: DialogueBatch, shares: dict[str, Tensor]) -> Iterator[Tensor]:
        """The share of the loss in micro-batches, each carried back before the next."""
        weights = self.weights_of(batch)
        for part in self.training.micro_batches(len(batch.tokens)):
            loss = self.loss_of(batch.part(part), weights[part])
            shares["loss/answers"] += loss.detach()
            yield loss

    def weights_of(self, batch: DialogueBatch) -> Tensor:
        """Of each text's tokens (b,): 1 / (cards * the answer tokens of its card in the whole batch)."""
        own = (batch.labels[:, 1:] != IGNORED).sum(1)  # the first token follows nothing
        counts = torch.zeros(self.data.cards, dtype=torch.int64, device=own.device)
        counts = all_reduce(counts.index_add(0, batch.card, own))
        present = (counts > 0).sum()
        return 1.0 / (present * counts.clamp_min(1)[batch.card]).to(self.dtype)

    def loss_of(self, batch: DialogueBatch, weights: Tensor) -> Tensor:
        """Sum over the answer tokens of texts, weighted by text. weights: (b,)."""
        compute = self.training.compute
        with compute.autocast():
            hidden = self.language.hidden(self.embedded(batch))  # (b, L, D)
            targets = batch.labels[:, 1:]
            learned = targets != IGNORED
            logits = self.language.head(hidden[:, :-1][learned])  # (n, V)
        losses = F.cross_entropy(logits.to(self.dtype), targets[learned], reduction="none")
        return (losses * weights[:, None].expand_as(targets)[learned]).sum()

    def embedded(self, batch: DialogueBatch) -> Tensor:
        """What the language model reads, (b, L, D)."""
        return self.language.embed(batch.tokens)

    def unrecordable(self) -> str:
        """The answer tokens, of which each batch has another number."""
        return "a language model's answer tokens are picked by a mask, whose count is read back"

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """A step."""
        return {"model": 3.0}

    # --- what is measured and kept ------------------------------------------------------------------------------------

    def epoch_metrics(self, epoch: int) -> dict[str, float]:
        """Nothing: what was learned is what the loss says."""
        return {}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """`answered`: share of the answer tokens of the last phase that are the likeliest, percent, of as many texts as a batch has."""
        self.batches.start_epoch(self.training.epochs)
        batch = self.training.batch(self.training.epochs, 0)
        with torch.no_grad(), eval_mode(self.model):
            hidden = self.language.hidden(self.embedded(batch))
            targets = batch.labels[:, 1:]
            learned = targets != IGNORED
            right = self.language.head(hidden[:, :-1][learned]).argmax(1) == targets[learned]
        counts = all_reduce(torch.stack([right.sum(), learned.sum()]).double())
        return {"answered": 100.0 * (counts[0] / counts[1]).item()}, {"weights": headline}

    def describe(self, batch: DialogueBatch) -> dict[str, Any]:  # type: ignore[override]
        """The batch."""
        return batch._asdict()
