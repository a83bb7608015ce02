"""Few labels and many pictures: FixMatch (Sohn et al. 2020) and Mean-Teacher (Tarvainen & Valpola 2017) as USB runs them.

    loss = CE(labelled, labels) + mean over all unlabelled of [confident] * consistency(student, target)

Source: USB's algorithms and the authors' copy of them, which has the confidence mask in Mean-Teacher too, no ramp, and GKL's terms.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.data.augment import to_float
from gkl.data.few_labels import FewBatch, FewBatches
from gkl.losses.consistency import Consistency
from gkl.models.timm_network import set_sample_keys
from gkl.optim.averaging import swapped
from trainers.loop.accuracy import clean_accuracy
from trainers.loop.console import Console
from trainers.loop.method import Method
from trainers.loop.training import Training
from trainers.methods.source import Source


@dataclass(kw_only=True)
class SemiSupervised(Method):
    """Base of both. confidence: of the target, from which on a picture counts. weight: of the consistency.

    initial: the pretrained network that the model begins as, but for its classifier. shown: whose accuracy the history has, last or
    an average's name.
    """

    consistency: Consistency
    confidence: float
    weight: float
    initial: Source | None = None
    shown: str = "last"
    reads_every_label: ClassVar[bool] = False

    def bind(self, training: Training) -> None:
        """Begin with the pretrained weights. Raises ValueError for other data."""
        super().bind(training)
        if not isinstance(training.batches, FewBatches):
            raise ValueError(
                f"{type(self).__name__} needs few labels and their weak and strong views: data=..._few augment=weak_strong"
            )
        self.data: Any = training.data
        self.origin: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        if self.initial is not None:
            pretrained, self.origin = self.initial.load(self.data.num_classes)
            own = self.model.state_dict()
            head = {
                f"{name}.{key}"
                for name, module in self.model.named_modules()
                if module is self.classifier
                for key in ("weight", "bias")
            }
            self.model.load_state_dict(
                {key: own[key] if key in head else value for key, value in pretrained.state_dict().items()}
            )

    @property
    def classifier(self) -> nn.Module:
        """The layer that no pretraining knows."""
        model: Any = self.model
        found: nn.Module = model.get_classifier()
        return found

    def inputs(self, batch: FewBatch, epoch: int, step: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        """All but the numbers of the pictures."""
        return tuple(batch)[:6]

    @abstractmethod
    def opinions(
        self, labelled: Tensor, weak: Tensor, strong: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the labelled (b, C), of the student on the unlabelled (u, C), and their targets (u, C)."""

    def update(
        self, labelled: Tensor, y: Tensor, weak: Tensor, strong: Tensor, hidden: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """One update; every term is this process's share of its mean over the global batch."""
        self.model.train()
        pictures = [to_float(x).to(self.dtype) for x in (labelled, weak, strong)]
        logits, student, target = self.opinions(pictures[0], pictures[1], pictures[2], keys)
        unlabelled = self.samples * self.data.unlabelled
        supervised = F.cross_entropy(logits, y, reduction="sum") / self.samples
        confident, label = target.detach().softmax(-1).max(-1)
        mask = (confident >= self.confidence).to(student.dtype)
        # The mask multiplies before the mean, which is over all pictures: the fewer are confident, the less they count.
        consistency = (self.consistency(student, target) * mask).sum() / unlabelled
        self.optimizer_step(supervised + self.weight * consistency)
        self.after_step()
        right = mask * (label == hidden)
        return {
            "loss/supervised": supervised.detach(), "loss/consistency": consistency.detach(),
            "train/confident": mask.sum() * (100.0 / unlabelled), "train/confident_right": right.sum() * (100.0 / unlabelled),
        }  # fmt: skip

    # --- what is measured and kept ------------------------------------------------------------------------------------

    def epoch_metrics(self, epoch: int) -> dict[str, float]:
        """Test accuracy of the weights that count."""
        state = None if self.shown == "last" else self.training.averages[self.shown].state
        with swapped(self.model, state or dict(self.model.named_parameters())):
            top1 = clean_accuracy(self.model, self.data, self.device)
        if not self.best or top1 > self.best["top1"]:
            self.best = {"epoch": epoch, "top1": top1}
        return {"test/top1": top1}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """`top1` of the headline's weights and `top1_best`, the best epoch's, in percent."""
        self.model.load_state_dict(self.training.weights()[headline])
        top1 = clean_accuracy(self.model, self.data, self.device)
        return {"top1": top1, "top1_best": self.best["top1"]}, {
            "weights": headline,
            "best_epoch": self.best["epoch"],
        }

    def describe(self, batch: FewBatch) -> dict[str, Any]:  # type: ignore[override]
        """The batch: views as they are seen."""
        return batch._asdict()

    def origins(self) -> dict[str, Any]:
        """Where the initial weights come from."""
        return {"initial": self.origin} if self.origin else {}

    def state_dict(self) -> dict[str, Any]:
        """The best epoch."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self.best = dict(state["best"])


@dataclass(kw_only=True)
class FixMatch(SemiSupervised):
    """The network's own opinion on the weak view is the target of the strong one; all three in one batch."""

    def opinions(
        self, labelled: Tensor, weak: Tensor, strong: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one forward pass."""
        set_sample_keys(self.model, keys)
        logits = self.logits(torch.cat([labelled, weak, strong]))
        of_labelled, of_weak, of_strong = logits.split([len(labelled), len(weak), len(strong)])
        return of_labelled, of_strong, of_weak

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """A step 3, of a labelled picture and both views of the unlabelled."""
        return {"model": 3.0 * (1 + 2 * config["data"]["unlabelled"])}


@dataclass(kw_only=True)
class MeanTeacher(SemiSupervised):
    """The target is the averaged network's opinion, in training mode and on another weak view."""

    def opinions(
        self, labelled: Tensor, weak: Tensor, strong: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of three forward passes."""
        own, first, second = keys.split([len(labelled), len(weak), len(strong)])
        set_sample_keys(self.model, own)
        logits = self.logits(labelled)
        with torch.no_grad(), swapped(self.model, self.training.averages["ema"].state):
            set_sample_keys(self.model, first)
            target = self.logits(weak)
        set_sample_keys(self.model, second)
        return logits, self.logits(strong), target

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """A step 3 of the labelled and of the unlabelled, the teacher's forward 1."""
        return {"model": 3.0 + 4.0 * config["data"]["unlabelled"]}
