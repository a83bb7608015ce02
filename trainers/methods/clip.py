"""CLIP (Radford et al. 2021), alone or taught by another CLIP (Table VII).

    loss = contrastive(student) + weight * loss(student's similarities, teacher's), both directions averaged

over all pairs of the global batch. Where it is taken in micro-batches, features are made without a graph, the loss is carried back to them,
and each part goes forward again with its features' gradient: exact, since a pair's features depend on no other. Source: OpenCLIP's training.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gkl.data.augment import to_float
from gkl.data.captions import CaptionBatch, CaptionData
from gkl.distributed import all_reduce, rank, world_size
from gkl.evaluation.zero_shot import class_weights, predicted
from gkl.losses.contrastive import Similarities, SimilarityLoss, both_ways, contrastive, similarities
from gkl.models.batch_norm import eval_mode
from gkl.models.clip import LARGEST_LOGIT_SCALE
from gkl.models.clip import Clip as TwoTowers
from trainers.loop.accuracy import batches_of, eval_batch_size
from trainers.loop.console import Console
from trainers.loop.method import Method
from trainers.loop.training import Training
from trainers.methods.source import Source, check_same_teacher


def check_towers(network: nn.Module, place: str) -> None:
    """Raises ValueError for a network of pictures alone."""
    if not isinstance(network, TwoTowers):
        raise ValueError(
            f"CLIP needs a network of two towers, got {type(network).__name__}; {place}=clip_b16 or clip_l14"
        )


@dataclass(kw_only=True)
class Clip(Method):
    """loss: between the similarities of student and teacher, each with its own scale. weight: of it.

    initial: the weights that the network begins with; a run of no epochs measures these.
    """

    teacher: Source | None = None
    loss: SimilarityLoss | None = None
    weight: float = 1.0
    initial: Source | None = None
    classifies: ClassVar[bool] = False
    takes_turns: ClassVar[bool] = True

    def bind(self, training: Training) -> None:
        """Load the teacher. Raises ValueError where networks and data do not fit."""
        super().bind(training)
        self.data = cast(Any, training.data)
        self.network = cast(Any, self.model)
        self.taught_by: Any = None
        self.origin: dict[str, Any] = {}
        self.began: dict[str, Any] = {}
        if (self.teacher is None) != (self.loss is None):
            raise ValueError(
                "a teacher and a loss come together: choose both teacher=... and loss=..., or neither"
            )
        if not isinstance(training.data, CaptionData):
            raise ValueError(
                f"CLIP needs pictures with captions, got {training.data.name}; data=digits_captions, datacomp, ..."
            )
        check_towers(self.model, "model")
        self.network.check_fits(self.data.tokenizer, self.data.image_size)
        if self.initial is not None:
            begun, self.began = self.initial.load(self.data.num_classes)
            self.model.load_state_dict(begun.state_dict())
        elif not training.epochs:
            raise ValueError(
                "a run of epochs=0 measures weights that are there: choose initial=..., or more epochs"
            )
        if self.teacher is not None:
            loaded, self.origin = self.teacher.load(self.data.num_classes)
            check_towers(loaded, "model@teacher.network")
            self.taught_by = training.compute.to_device(loaded).eval().requires_grad_(False)
            self.taught_by.check_fits(self.data.tokenizer, self.data.image_size, "teacher.network")

    # --- a step -------------------------------------------------------------------------------------------------------

    def inputs(self, batch: CaptionBatch, epoch: int, step: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Pictures, tokens, and how many damaged pairs were passed over."""
        return batch.images, batch.tokens, batch.replaced

    def features(self, network: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A network's features (b, D) of pictures and captions, of length 1, in float32 or better."""
        compute = self.training.compute
        with compute.autocast():
            images, texts = network(x.contiguous(memory_format=compute.memory_format), tokens)
        return images.to(self.dtype), texts.to(self.dtype)

    def update(self, images: Tensor, tokens: Tensor, replaced: Tensor) -> dict[str, Tensor]:
        """One update; every term is this process's share of its mean over the global batch."""
        x = to_float(images).to(self.dtype)  # (b, 3, H, W)
        self.model.train()
        shares: dict[str, Tensor] = {}
        self.optimizer_step(self.losses(x, tokens, shares))
        with torch.no_grad():
            self.network.logit_scale.clamp_(0.0, LARGEST_LOGIT_SCALE)
        self.after_step()
        scale = self.network.logit_scale.detach().exp() / world_size()
        return {**shares, "train/logit_scale": scale, "data/replaced": 100.0 * replaced / self.samples}

    def losses(self, x: Tensor, tokens: Tensor, shares: dict[str, Tensor]) -> Iterator[Tensor]:
        """The share of the loss, whole or in parts each of which is carried back before the next; its terms go to `shares`."""
        parts = list(self.training.micro_batches(len(x)))
        theirs = self.teacher_similarities(x, tokens, parts)
        if len(parts) == 1:
            yield self.loss_of(*self.features(self.model, x, tokens), theirs, shares)
            return
        images, texts = (f.requires_grad_() for f in self.without_graph(self.model, x, tokens, parts))
        yield self.loss_of(images, texts, theirs, shares)
        assert images.grad is not None and texts.grad is not None
        scale = self.training.scaler.get_scale()  # each part is scaled as it is carried back
        for part in parts:
            again = self.features(self.model, x[part], tokens[part])
            yield ((again[0] * images.grad[part]).sum() + (again[1] * texts.grad[part]).sum()) / scale

    def without_graph(
        self, network: nn.Module, x: Tensor, tokens: Tensor, parts: Sequence[slice]
    ) -> tuple[Tensor, Tensor]:
        """Features of all parts, one after the other."""
        with torch.no_grad():
            made = [self.features(network, x[part], tokens[part]) for part in parts]
        images, texts = (torch.cat(features) for features in zip(*made, strict=True))
        return images, texts

    def teacher_similarities(self, x: Tensor, tokens: Tensor, parts: Sequence[slice]) -> Similarities | None:
        """The teacher's, without gradient."""
        if self.taught_by is None:
            return None
        with torch.no_grad():
            made = self.without_graph(self.taught_by, x, tokens, parts)
            return similarities(*made, self.taught_by.logit_scale.exp().to(self.dtype))

    def loss_of(
        self, images: Tensor, texts: Tensor, theirs: Similarities | None, shares: dict[str, Tensor]
    ) -> Tensor:
        """This process's share of the loss of its features (b, D)."""
        own = similarities(images, texts, self.network.logit_scale.exp().to(self.dtype))
        terms = {"contrastive": contrastive(own)}  # (b,) each
        if theirs is not None and self.loss is not None:
            terms["distillation"] = self.weight * both_ways(self.loss, own, theirs)
        found = {f"loss/{name}": values.sum() / self.samples for name, values in terms.items()}
        shares |= {name: value.detach() for name, value in found.items()}
        return torch.stack(list(found.values())).sum()

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """A step 3, 4 in micro-batches, whose features are made twice; the teacher's forward 1."""
        own = 4.0 if config.get("accumulate", 1) > 1 else 3.0  # a record does not say
        return {"model": own, **({"teacher.network": 1.0} if config.get("teacher") else {})}

    def unrecordable(self) -> str | None:
        """Processes tell each other their numbers of pairs."""
        return "CLIP's loss gathers what processes hold" if world_size() > 1 else None

    # --- what is measured and kept ------------------------------------------------------------------------------------

    def zero_shot(self, network: Any, metric: str, weights: Tensor) -> float:
        """Accuracy on a test, percent, each picture looked at by one process. weights: (D, C)."""
        pictures, among = self.data.tests[metric]
        mine = torch.arange(len(pictures.labels)).tensor_split(world_size())[rank()]
        right = torch.zeros((), dtype=torch.float64, device=self.device)
        size = eval_batch_size(self.device)
        with torch.no_grad():
            for x, y in batches_of(self.data, mine, size, self.training.workers, pictures):
                seen = to_float(x.to(self.device)).to(self.dtype)
                found = predicted(network.image_features(seen), weights, among)
                right += (found == y.to(self.device)).sum()
        return 100.0 * all_reduce(right).item() / len(pictures.labels)

    def accuracies(self, network: Any, metrics: Sequence[str]) -> dict[str, float]:
        """On some of the tests, percent."""
        data = self.data
        with eval_mode(network):
            weights = class_weights(
                network.text_features, data.tokenizer, data.class_names, data.templates, self.device
            )
            return {metric: self.zero_shot(network, metric, weights) for metric in metrics}

    def epoch_metrics(self, epoch: int) -> dict[str, float]:
        """Zero-shot accuracy on ImageNet's own pictures."""
        return {f"test/{k}": v for k, v in self.accuracies(self.model, ["imagenet"]).items()}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Zero-shot accuracy on every test of the data, percent, of the headline's weights."""
        self.model.load_state_dict(self.training.weights()[headline])
        if self.taught_by is not None:
            self.origin["top1"] = self.accuracies(self.taught_by, ["imagenet"])["imagenet"]
        details = {
            name: {"n": len(test.pictures.labels), "classes": int(test.among.sum())}
            for name, test in self.data.tests.items()
        }
        return self.accuracies(self.model, list(self.data.tests)), {"weights": headline, "tests": details}

    def describe(self, batch: CaptionBatch) -> dict[str, Any]:  # type: ignore[override]
        """The batch and its features."""
        x = to_float(batch.images).to(self.dtype)
        with torch.no_grad():
            images, texts = self.features(self.model, x, batch.tokens)
        return {**batch._asdict(), "image_features": images, "text_features": texts}

    def origins(self) -> dict[str, Any]:
        """Where the teacher comes from, or what the network began with."""
        return {k: v for k, v in (("teacher", self.origin), ("initial", self.began)) if v}

    def state_dict(self) -> dict[str, Any]:
        """Which teacher it was; the teacher's weights are its own run's."""
        return {"teacher": self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict. Raises ConfigError for a checkpoint that was trained with another teacher."""
        check_same_teacher(state["teacher"], self.origin)
