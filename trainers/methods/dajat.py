"""DAJAT (Addepalli et al. 2022), what the paper's tables call "ACAT, AutoAug": basic and AutoAugment views trained jointly.

    mean over views of [CE(f(x_v), y) + beta * KL(f(x_v) || f(x_v adv))] + js_weight * JS(f(x_1), ..., f(x_V))

Simple and strong views have batch norms of their own; attack and weight perturbation follow ACAT, the latter on the
basic view alone. At test time the basic batch norm is used.
Source: the paper's Eq. 4 and its released train_DAJAT.py, which has up to two strong views; three follow the same rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.data.batches import Batch
from gkl.losses.objectives import Objective
from gkl.losses.prior import ClassPrior
from gkl.models.batch_norm import auxiliary_batch_norm, split_batch_norm
from trainers.loop.training import Training
from trainers.methods.robust import RobustMethod, TwoViews, awp_share, view_count


@dataclass(kw_only=True)
class DAJAT(RobustMethod):
    """augment's first view is the basic one, the others are strong. label_smoothing: of the step's CE, torch's convention."""

    views_together: ClassVar[bool] = True

    loss: Objective
    attack_loss: Objective
    prior: Callable[..., ClassPrior]
    js_weight: float
    label_smoothing: float = 0.0

    def bind(self, training: Training) -> None:
        """The loss between clean and adversarial view, with its prior."""
        super().bind(training)
        views = training.setup.augment.views
        if len(views) < 2:
            raise ValueError(f"DAJAT needs a basic and at least one strong view, got {list(views)}")
        self.views = TwoViews(self, self.loss, self.attack_loss, self.prior)

    def adapt(self, model: nn.Module) -> nn.Module:
        """With a second batch norm for the strong views."""
        return split_batch_norm(model)

    def inputs(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, ...]:
        """All views of each picture, on one process; labels; the keys of the attack's random starts."""
        images, draws, y, view, index = batch
        return images, draws, y, view, self.start_keys(epoch, index)

    def update(
        self, images: Tensor, draws: Tensor, y: Tensor, view: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """One update; losses are this process's shares of means over the global batch."""
        self.draw_paths(keys)
        views = self.see(images, view, draws)  # (V, b, 3, H, W)
        batch = self.samples

        attacked = []
        for number, x in enumerate(views):
            with auxiliary_batch_norm(self.model, number > 0):
                attacked.append(self.views.adversarial(x, y, keys + number))
        self.model.train()

        def worst_case() -> Tensor:
            clean, adversarial = self.logits(views[0]), self.logits(attacked[0])  # (b, C)
            robust = self.views.loss(adversarial, clean, y)
            return (F.cross_entropy(clean, y, reduction="sum") + robust.sum()) / batch

        with self.awp(worst_case):
            natural = robust = torch.zeros((), device=self.device, dtype=self.dtype)
            clean_logits, adversarial_logits = [], []
            for number, (x, x_adv) in enumerate(zip(views, attacked, strict=True)):
                with auxiliary_batch_norm(self.model, number > 0):
                    clean, adversarial = self.logits(x), self.logits(x_adv)
                smoothed = F.cross_entropy(clean, y, reduction="sum", label_smoothing=self.label_smoothing)
                natural = natural + smoothed / self.items
                robust = robust + self.views.loss(adversarial, clean, y).sum() / self.items
                clean_logits.append(clean)
                adversarial_logits.append(adversarial.detach())
            agreement = self.js_weight * jensen_shannon(clean_logits).sum() / batch
            self.optimizer_step(natural + robust + agreement)
        self.views.update(clean_logits[0], y)
        self.after_step()
        correct = (adversarial_logits[0].argmax(-1) == y).sum() * (100.0 / batch)
        return {
            "loss/natural": natural,
            "loss/robust": robust,
            "loss/agreement": agreement,
            "train/robust_accuracy": correct,
        }

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Attack 2K + 1 and the step 6 for each view, AWP 6 for one."""
        return {"model": view_count(config) * (2 * steps + 1 + 6) + 6 * awp_share(config, epoch)}

    def parts(self) -> Sequence[TwoViews]:
        """The loss between the views, with its prior."""
        return (self.views,)


def jensen_shannon(logits: list[Tensor]) -> Tensor:
    """(B,) mean KL of the views' predictions to their mixture, in nats. logits: (B, C) each."""
    probs = torch.stack([F.softmax(z, dim=-1) for z in logits])
    mixture = probs.mean(0).clamp(1e-7, 1.0).log()
    return torch.stack([F.kl_div(mixture, p, reduction="none").sum(-1) for p in probs]).mean(0)
