"""PGD adversarial training (Madry et al. 2018): with a chosen epoch it is Rice et al. 2020, with AWP Wu et al. 2020's AT-AWP.

min_w  CE(f_{w + v}(x_adv), y)  with x_adv = PGD on CE, and v the weight perturbation that raises the same loss.
Source: the two papers' released training scripts, whose clean forward after each step feeds the running statistics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.methods.robust import RobustMethod, awp_share, view_count


@dataclass(kw_only=True)
class PGDTraining(RobustMethod):
    """Cross-entropy of adversarial images alone."""

    def update(
        self, images: Tensor, draws: Tensor, y: Tensor, view: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """One update; the loss is this process's share of the mean over the global batch."""
        self.draw_paths(keys)
        x = self.see(images, view, draws)  # (b, 3, H, W)
        x_adv = self.adversarial(x, y, keys)
        self.model.train()

        def loss() -> tuple[Tensor, Tensor]:
            logits = self.logits(x_adv)  # (b, C)
            return F.cross_entropy(logits, y, reduction="sum") / self.items, logits

        with self.awp(lambda: loss()[0]):
            robust, logits = loss()
            self.optimizer_step(robust)
        with torch.no_grad():
            clean = self.logits(x)  # in training mode: half of what the running statistics see
            natural = F.cross_entropy(clean, y, reduction="sum") / self.items
        self.after_step()
        correct = (logits.detach().argmax(-1) == y).sum() * (100.0 / self.items)
        return {"loss/natural": natural, "loss/robust": robust, "train/robust_accuracy": correct}

    def adversarial(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """The images to train on."""
        return self.perturb(x, lambda logits: F.cross_entropy(logits, y, reduction="none"), keys)

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Attack 2K, AWP 3, the step 3, the clean images 1."""
        return {"model": view_count(config) * (2 * steps + 3 * awp_share(config, epoch) + 3 + 1)}
