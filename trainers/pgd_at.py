"""PGD adversarial training (Madry et al. 2018): with a chosen epoch it is Rice et al. 2020, with AWP Wu et al. 2020's AT-AWP.

min_w  CE(f_{w + v}(x_adv), y)  with x_adv = PGD on CE, and v the weight perturbation that raises the same loss.
Source: the two papers' released training scripts, whose clean forward after each step feeds the running statistics.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.robust import RobustTraining, awp_share, view_count


class PGDTraining(RobustTraining):
    """Cross-entropy of adversarial images alone."""

    def __init__(self, *, awp_gamma: float, awp_start_epoch: int, **common: Any) -> None:
        """awp_gamma: 0 trains without AWP. common: see RobustTraining."""
        super().__init__(**common)
        self.awp_gamma, self.awp_start_epoch = awp_gamma, awp_start_epoch

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """Whether weights are perturbed, too."""
        return (epoch >= self.awp_start_epoch, *super().constants(epoch))

    def update(
        self, images: Tensor, draws: Tensor, y: Tensor, view: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """One update; the loss is this process's share of the mean over the global batch."""
        x = self.seen(images, view, draws)
        x_adv = self.adversarial(x, y, keys)
        self.model.train()
        items = self.samples * len(self.augment.views)

        def loss() -> tuple[Tensor, Tensor]:
            logits = self.logits(x_adv)
            return F.cross_entropy(logits, y, reduction="sum") / items, logits

        with self.awp(lambda: loss()[0], self.awp_gamma, active=self.epoch >= self.awp_start_epoch):
            robust, logits = loss()
            self.descend(robust)
        with torch.no_grad():
            clean = self.logits(x)  # in training mode: half of what the running statistics see
            natural = F.cross_entropy(clean, y, reduction="sum") / items
        self.after_step()
        correct = (logits.detach().argmax(-1) == y).sum() * (100.0 / items)
        return {"loss/natural": natural, "loss/robust": robust, "train/robust_accuracy": correct}

    def adversarial(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """The images to train on."""
        return self.attacked(x, lambda logits: F.cross_entropy(logits, y, reduction="none"), keys)

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Attack 2K, AWP 3, the step 3, the clean images 1."""
        return {"model": view_count(config) * (2 * steps + 3 * awp_share(config, epoch) + 3 + 1)}
